"""Conditional context optimisation: each image shifts the learned context of its prompts.

Zhou 2022 (CoCoOp, arXiv 2203.05557), equations 3 and 4: a small network (the meta-net, two linear
layers with a ReLU between, D -> D / 16 -> width of a token) turns an image's feature into a vector
that is added to each of the context tokens; every image then has K prompts of its own. Public
code: KaiyangZhou/CoOp, whose recipe (4 tokens of "a photo of a", SGD 2e-3, batch 1, 10 epochs) the
defaults follow.

The text tower runs over images x classes, in training and when judging. The prefix (start token
and context) runs once per image, the class names behind it once per image and class; images are
taken in chunks that keep activations below `max_activation_memory`. The saved head carries the
text tower's blocks, since no fixed text feature stands for its classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipelines.backbones import frozen_tower
from pipelines.backbones.text_tower import TextTower, activation_bytes, encode_shared
from pipelines.config import UserError
from pipelines.heads import base, coop, rules
from pipelines.heads.base import (
    Arrays,
    HeadConfig,
    HeadContext,
    HeadOutput,
    HeadPlugin,
    Predictor,
    Settings,
)

# Images of one pass of the text tower when nothing is to be differentiated: more gain nothing.
CHUNK = 32
NETWORK = ("down", "down_bias", "up", "up_bias")


class Config(HeadConfig):
    """Prompts that depend on the image."""

    name: Literal["cocoop"] = "cocoop"
    num_context: int = Field(4, ge=1, description="learned context tokens")
    init_phrase: str | None = Field(
        None, description="start from this phrase's tokens instead of N(0, 0.02)"
    )
    reduction: int = Field(16, ge=1, description="D divided by the width of the meta-net")
    max_activation_memory: float = Field(
        4.0, gt=0, description="GiB of the text tower's activations; images are cut to chunks"
    )
    # An image's similarities are no product with text features that all images share.
    has_text_features: ClassVar[bool] = False


class CoCoOp(nn.Module):
    """A learned context, and a small network that shifts it for each image."""

    def __init__(
        self,
        prompts: coop.CoOp,
        network: Mapping[str, Tensor],
        *,
        max_activation_memory: float,
    ) -> None:
        """Keep CoOp's context, tower and class names; `network` holds `NETWORK`'s tensors.

        Args:
            prompts: CoOp's head with a shared context and the class names at the end.
            network: down (B, D), down_bias (B,), up (W, B), up_bias (W,).
            max_activation_memory: GiB of the text tower's activations at a time.
        """
        super().__init__()
        self.tower = prompts.tower
        self.logit_scale = prompts.logit_scale
        self.class_names = prompts.class_names
        self.max_activation_memory = max_activation_memory
        self.context = nn.Parameter(prompts.context.detach())
        for name in NETWORK:
            self.register_parameter(name, nn.Parameter(network[name]))
        start, suffixes, ends = prompts.frozen()
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("suffixes", suffixes, persistent=False)
        self.register_buffer("ends", ends, persistent=False)

    def text_features(self) -> Tensor:
        """Refused: every image has text features of its own.

        Raises:
            UserError: always.
        """
        raise UserError("head=cocoop has no text features that all images share")

    def image_text_features(self, image_features: Tensor) -> Tensor:
        """(N, K, D) unit text features of each of (N, D) images, with gradients."""
        network = {name: getattr(self, name) for name in NETWORK}
        prefixes = _prefixes(self.start, self.context, network, image_features)  # type: ignore[arg-type]
        chunks = torch.split(prefixes, self._images_at_once(prefixes.shape[1]))
        return torch.cat([self._encode(chunk, len(chunks) > 1) for chunk in chunks])

    def _image_bytes(self, prefix: int) -> int:
        """Activations of one image's prompts."""
        suffixes: Tensor = self.suffixes  # type: ignore[assignment]
        return activation_bytes(self.tower, prefix, suffixes.shape[0] * suffixes.shape[1])

    def _images_at_once(self, prefix: int) -> int:
        fitting = int(self.max_activation_memory * 2**30 // self._image_bytes(prefix))
        return max(1, fitting if torch.is_grad_enabled() else min(fitting, CHUNK))

    def _encode(self, prefixes: Tensor, again: bool) -> Tensor:
        """Unit text features (n, K, D) of a chunk; `again`: computed anew when differentiated.

        So no more than one chunk's activations are there at a time. Where one image alone needs
        more, its layers are computed anew one by one.
        """
        image_bytes = self._image_bytes(prefixes.shape[1])
        recompute = image_bytes > self.max_activation_memory * 2**30

        def encode(part: Tensor) -> Tensor:
            ends: Tensor = self.ends  # type: ignore[assignment]
            suffixes: Tensor = self.suffixes  # type: ignore[assignment]
            text = encode_shared(self.tower, part, suffixes, ends, recompute=recompute)
            return F.normalize(text, dim=-1)

        if again and torch.is_grad_enabled() and not recompute:
            chunk: Tensor = checkpoint(
                encode, prefixes, use_reentrant=False, preserve_rng_state=False
            )
            return chunk
        return encode(prefixes)

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with the prompts that each makes of the classes."""
        text = self.image_text_features(image_features)
        similarity = (text @ image_features.unsqueeze(-1)).squeeze(-1)
        return HeadOutput(similarity, image_features)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """Context, network and class tokens as they are now, with the tower that reads them."""
        suffixes: Tensor = self.suffixes  # type: ignore[assignment]
        length = 1 + len(self.context) + suffixes.shape[1]
        arrays, tower = frozen_tower.to_arrays(self.tower, length)
        names = ("start", "context", "suffixes", *NETWORK)
        arrays.update({name: base.to_numpy(getattr(self, name)) for name in names})
        ends: list[int] = self.ends.tolist()  # type: ignore[operator]
        settings = {**tower.model_dump(), "ends": ends}
        return Predictor("cocoop", arrays, settings, self.logit_scale, self.class_names)


def _prefixes(
    start: Tensor, context: Tensor, network: Mapping[str, Tensor], image_features: Tensor
) -> Tensor:
    """(N, 1 + C, W): the start token and the context, shifted for each of (N, D) images."""
    hidden = F.relu(F.linear(image_features, network["down"], network["down_bias"]))
    shift = F.linear(hidden, network["up"], network["up_bias"])
    shifted = context + shift.unsqueeze(1)
    return torch.cat((start.expand(len(shifted), -1, -1), shifted), dim=1)


def build(config: Config, context: HeadContext, seed: int) -> CoCoOp:
    """CoOp's context, and a meta-net uniform in +-1/sqrt(fan in), as torch's layers start.

    Raises:
        UserError: where a prompt is longer than the text tower takes, or the tower is of a kind
            that the head could not carry.
    """
    same = {"num_context": config.num_context, "init_phrase": config.init_phrase}
    prompts = coop.build(coop.Config(**same), context, seed)
    frozen_tower.check(prompts.tower)
    dim, width = context.features.shape[1], prompts.tower.width
    hidden = max(1, dim // config.reduction)
    shapes = {
        "down": ((hidden, dim), dim),
        "down_bias": ((hidden,), dim),
        "up": ((width, hidden), hidden),
        "up_bias": ((width,), hidden),
    }
    network = {
        name: base.uniform(shape, 1 / math.sqrt(fan_in), seed + 1 + number)
        for number, (name, (shape, fan_in)) in enumerate(shapes.items())
    }
    device = context.features.device
    return CoCoOp(
        prompts,
        {name: tensor.to(device) for name, tensor in network.items()},
        max_activation_memory=config.max_activation_memory,
    )


def similarity(
    arrays: Arrays,
    settings: Settings,
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The rule of the predictor, in float64.

    Each image goes through the tower alone, so that nothing of its result depends on the others.
    Rows of zeros pad a block, and are left at zero.
    """
    names = frozen_tower.TowerSettings.model_fields
    kept = frozen_tower.TowerSettings.model_validate({name: settings[name] for name in names})
    tower = frozen_tower.from_arrays(arrays, kept)
    prompts = {n: torch.from_numpy(arrays[n]) for n in ("start", "context", "suffixes", *NETWORK)}
    ends = torch.tensor(rules.numbers(settings, "ends"))
    result = np.zeros((len(features), len(ends)))
    with torch.inference_mode():
        for row in np.flatnonzero(features.any(axis=1)):
            image = torch.from_numpy(features[row : row + 1])
            result[row] = _judge(tower, prompts, ends, image).numpy()
    return result


def _judge(tower: TextTower, prompts: Mapping[str, Tensor], ends: Tensor, image: Tensor) -> Tensor:
    """Similarities (K,) of one image (1, D)."""
    prefix = _prefixes(prompts["start"], prompts["context"], prompts, image)[0]
    text = F.normalize(encode_shared(tower, prefix, prompts["suffixes"], ends), dim=-1)
    return text @ image[0]


PLUGIN = HeadPlugin(
    Config,
    build,
    similarity,
)
