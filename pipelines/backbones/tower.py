"""What every frozen backbone is: an image tower with its preprocessing and its identity.

A kind of backbone is a file in `pipelines/backbones/kinds/` that ends in
`PLUGIN = BackboneKind(...)`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.backbones.description import BackboneConfig, Start
from pipelines.config import UserError
from pipelines.data.storage import Storage

if TYPE_CHECKING:  # it builds on what builds on this module
    from pipelines.backbones.trainable import TrainableNetwork

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
Crop: TypeAlias = Callable[[Image.Image], Image.Image]
# Called with (steps done, in all) where a backbone has to be trained.
OnProgress: TypeAlias = Callable[[int, int], None]
# Normalised pixels (N, 3, H, W) to features (N, D), without gradients.
Encode: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Tower(ABC):
    """A frozen image tower, ready to encode.

    Attributes:
        name: of the backbone, for messages.
        crop: RGB image -> RGB image of the model's size (resize and crop, 8-bit).
        mean: channel means, for pixels in [0, 1].
        std: channel standard deviations.
        embed_dim: D, the length of a feature.
        logit_scale: the factor from similarities to logits (already exponentiated); 1 where the
            backbone's own layer gives logits.
        identity: what decides a feature's value.
        dtype: of the image tower.
        image_size: (height, width) of what `crop` gives.
    """

    name: str
    crop: Crop
    mean: Tensor
    std: Tensor
    embed_dim: int
    logit_scale: float
    identity: Mapping[str, str]
    dtype: torch.dtype
    image_size: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def preprocess(self, image: Image.Image) -> Tensor:
        """RGB image -> normalised float32 pixels (3, H, W), as open_clip's own transform gives."""
        cropped = self.crop(image).convert("RGB")
        width, height = cropped.size
        pixels = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8)
        return self.normalize(pixels.reshape(1, height, width, 3))[0]

    def normalize(self, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> normalised float32 (N, 3, H, W) on the model's device."""
        return self.to_unit(pixels).sub_(self.mean).div_(self.std)

    def to_unit(self, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> float32 (N, 3, H, W) in [0, 1] on the model's device."""
        moved = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        return moved.to(torch.float32).div_(255)

    def standardize(self, unit: Tensor) -> Tensor:
        """The second half of `normalize`: (N, 3, H, W) in [0, 1] -> normalised, differentiably."""
        return (unit - self.mean) / self.std

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) -> features (N, D), float32, in the gradient mode set."""

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """The same as `features`, without gradients."""
        return self.features(pixels)

    def encode_with_local(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Features (N, D) and local ones (N, P, D).

        Raises:
            UserError: where the backbone has none that can be compared with its features.
        """
        raise UserError(
            f"backbone {self.name}: no local features; embed.local_features=true needs a "
            "vision-language model"
        )

    def layers(self, pixels: Tensor) -> Tensor:  # noqa: ARG002
        """Normalised pixels (N, 3, H, W) -> mean activations of its layers side by side (N, W).

        Raises:
            UserError: where the backbone names no layers (`backbone.layers`).
        """
        raise UserError(f"backbone {self.name}: it names no layers (backbone.layers)")

    @property
    def num_local(self) -> int:
        """P, the number of local features of an image."""
        pixels = torch.zeros(1, 3, *self.image_size, device=self.device)
        return self.encode_with_local(pixels)[1].shape[1]


# Of a tower on the CPU, a batch size and a number of threads: what encodes in the tower's place.
MakeEngine: TypeAlias = Callable[[Tower, int, int], Encode]


@dataclass(frozen=True)
class BackboneKind:
    """The record of a kind of backbone: what its file gives.

    Attributes:
        resolve: the configuration with its files named; trains or downloads what is missing.
        identity: what decides a feature's value, of a resolved configuration, without weights.
        cropping: the resize and crop (RGB image -> RGB image), which needs no weights.
        load: the frozen backbone of a resolved configuration on a device.
        code: the functions that decide a feature, for the digest of the code.
        has_text: whether it encodes texts too.
        trainable: of (configuration, class names, where it starts, seed) the network before
            training; None: the kind is not trained end to end.
    """

    resolve: Callable[[BackboneConfig, Storage, OnProgress | None], BackboneConfig]
    identity: Callable[[BackboneConfig], dict[str, str]]
    cropping: Callable[[BackboneConfig], Crop]
    load: Callable[[BackboneConfig, str], Tower]
    code: tuple[Callable[..., object], ...]
    has_text: bool = False
    trainable: Callable[[BackboneConfig, Sequence[str], Start, int], TrainableNetwork] | None = None


def reduce_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Weights in `dtype`, batch normalisation in float32: its statistics span many powers of 2."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    exact = [copy.deepcopy(norm.state_dict()) for norm in norms]
    network.to(dtype)
    for norm, state in zip(norms, exact, strict=True):
        norm.float().load_state_dict(state)


def apply_steps(steps: list[Crop], image: Image.Image) -> Image.Image:
    """The steps of a resize and crop, one after the other."""
    for step in steps:
        image = step(image)
    return image
