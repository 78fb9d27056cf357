"""CLIP-like backbones through open_clip: loaded from files that are safe to read, ready to encode.

`load` gives the model of a resolved configuration on any worker. Which backbone that is, where
its files are and what names it by content stands in `pipelines.backbones.description`; its
`BackboneConfig`, `resolve` and `identity` are offered here too. Weights come from safetensors or
from `torch.load(weights_only=True)`, never from a pickle.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from pipelines.backbones import local
from pipelines.backbones.description import (
    Architecture,
    BackboneConfig,
    architecture,
    file_hash,
    identity,
    resolve,
)
from pipelines.config import UserError

__all__ = [
    "BackboneConfig",
    "Clip",
    "cropping",
    "file_hash",
    "identity",
    "load",
    "resolve",
]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
TEXT_BATCH = 256


@dataclass(frozen=True)
class Clip:
    """A frozen backbone, ready to encode.

    Attributes:
        model: open_clip's CLIP in eval mode; the text tower is always float32.
        tokenizer: texts -> tokens (K, context_length).
        crop: RGB image -> RGB image of the model's size (resize and crop, 8-bit).
        mean: channel means, for pixels in [0, 1].
        std: channel standard deviations.
        embed_dim: D, the length of a feature.
        context_length: tokens of a text.
        logit_scale: the factor from similarity to logits (already exponentiated).
        identity: what decides a feature's value; see `identity`.
        dtype: of the image tower.
        image_size: (height, width) of what `crop` gives.
    """

    model: Any  # open_clip's CLIP or CustomTextCLIP
    tokenizer: Callable[[Sequence[str]], Tensor]
    crop: Callable[[Image.Image], Image.Image]
    mean: Tensor
    std: Tensor
    embed_dim: int
    context_length: int
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

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) -> image_features (N, D), float32, unit length."""
        return self.features(pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """The same as `encode_image`, in the caller's gradient mode."""
        features: Tensor = self.model.encode_image(pixels.to(self.device, self.dtype))
        return functional.normalize(features.to(torch.float32), dim=-1)

    @torch.inference_mode()
    def encode_with_local(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels -> image_features (N, D) and local ones (N, P, D), unit length."""
        pair = local.encode_with_local(self.model, pixels.to(self.device, self.dtype))
        features, each = (functional.normalize(x.to(torch.float32), dim=-1) for x in pair)
        return features, each

    @property
    def num_local(self) -> int:
        """P, the number of local features of an image."""
        pixels = torch.zeros(1, 3, *self.image_size, device=self.device)
        return self.encode_with_local(pixels)[1].shape[1]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> text_features (K, D), float32, unit length; usable in a training graph."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        parts = [
            self.model.encode_text(part, normalize=True) for part in torch.split(tokens, TEXT_BATCH)
        ]
        return torch.cat(parts).to(torch.float32)


def load(config: BackboneConfig, *, device: str = "cpu") -> Clip:
    """The model of a resolved configuration, frozen, in eval mode.

    Raises:
        UserError: where the weights cannot be read safely or belong to another architecture.
    """
    names = identity(config)
    described = architecture(config)
    model = _build(config, described)
    _load_weights(model, config)
    model.eval().requires_grad_(False)
    scale = model.logit_scale.exp().item()
    dtype = DTYPES[config.precision]
    _reduce(model.visual, dtype)
    model.to(device)
    length = context_length(described)
    return Clip(
        model=model,
        tokenizer=_tokenizer(config, length),
        crop=cropping(config),
        mean=torch.tensor(described.preprocessing["mean"], device=device).view(3, 1, 1),
        std=torch.tensor(described.preprocessing["std"], device=device).view(3, 1, 1),
        embed_dim=int(described.model["embed_dim"]),
        context_length=length,
        logit_scale=scale,
        identity=names,
        dtype=dtype,
        image_size=_pair(described.preprocessing["size"]),
    )


def _reduce(visual: nn.Module, dtype: torch.dtype) -> None:
    """Weights in `dtype`, batch normalisation in float32: its statistics span many powers of 2."""
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    exact = [copy.deepcopy(norm.state_dict()) for norm in norms]
    visual.to(dtype)
    for norm, state in zip(norms, exact, strict=True):
        norm.float().load_state_dict(state)


def cropping(config: BackboneConfig) -> Callable[[Image.Image], Image.Image]:
    """The model's resize and crop (RGB image -> RGB image), which needs no weights."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocessing = architecture(config).preprocessing
    transform = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    steps = transform.transforms[:-3]  # then: to RGB, to tensor, normalise
    return functools.partial(_apply, steps)


def _apply(steps: Sequence[Callable[[Any], Any]], image: Image.Image) -> Image.Image:
    for step in steps:
        image = step(image)
    return image


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _build(config: BackboneConfig, described: Architecture) -> Any:
    """The architecture with its weights still to come: nothing is fetched for its towers."""
    import open_clip

    arguments = json.loads(json.dumps(described.model))
    custom = arguments.pop("custom_text", False) or "hf_model_name" in arguments["text_cfg"]
    if "multimodal_cfg" in arguments:
        raise UserError(f"backbone {config.name}: a captioning model (CoCa) is not supported")
    if "timm_model_name" in arguments["vision_cfg"]:
        arguments["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in arguments["text_cfg"]:
        arguments["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        return kind(**arguments)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"backbone {config.name}: not buildable ({error})") from None


def _load_weights(model: nn.Module, config: BackboneConfig) -> None:
    """Every parameter from the file, or an error.

    Raises:
        UserError: for TorchScript archives and pickles of objects, which can run code, and for
            files that lack a parameter or have another shape.
    """
    import open_clip

    path = str(config.path)
    if _is_torchscript(path):
        raise UserError(
            f"backbone {config.name}: {path} is a TorchScript archive, which holds code; give "
            "the same weights as safetensors or as a plain state dict"
        )
    try:
        open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"backbone {config.name}: {path} holds objects, not only weights; give safetensors "
            f"({str(error).splitlines()[0]})"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        detail = " ".join(line.strip() for line in lines[:3])[:300]
        raise UserError(
            f"backbone {config.name}: {path} does not hold the weights of "
            f"{config.model or config.config} ({detail})"
        ) from None


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def tokenizer(config: BackboneConfig) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> tokens (K, context_length), which needs no weights.

    Raises:
        UserError: where there is none.
    """
    return _tokenizer(config, context_length(architecture(config)))


def context_length(described: Architecture) -> int:
    """How many tokens of a text the model reads."""
    return int(described.model["text_cfg"].get("context_length", 77))


def _tokenizer(config: BackboneConfig, context_length: int) -> Callable[[Sequence[str]], Tensor]:
    import open_clip

    if config.config is not None:
        return open_clip.SimpleTokenizer(context_length=context_length)  # type: ignore[no-any-return]
    try:
        return open_clip.get_tokenizer(config.model)  # type: ignore[no-any-return]
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"backbone {config.name}: no tokenizer ({error})") from None
