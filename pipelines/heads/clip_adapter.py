"""CLIP-Adapter: a small bottleneck on image features, mixed with the features themselves.

Gao 2021 (CLIP-Adapter), equations 3 to 5, for the visual side only, as the public code does
(the paper's text adapter brought nothing more). Bottleneck D / 4, ReLU after both layers, no
biases, residual ratio 0.2 as in the public code (the paper searches it per data set). The adapter
sees features of unit length, the public code's those before normalisation: without biases its
output is only scaled by the length, which the normalisation of the mix takes away.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from pipelines.heads import base, rules
from pipelines.heads.base import (
    Arrays,
    HeadConfig,
    HeadContext,
    HeadOutput,
    HeadPlugin,
    Predictor,
    Settings,
)
from pipelines.heads.zero_shot import template_features


class Config(HeadConfig):
    """A bottleneck adapter on image features."""

    name: Literal["clip_adapter"] = "clip_adapter"
    reduction: int = Field(4, ge=1, description="D divided by the width of the bottleneck")
    ratio: float = Field(0.2, gt=0, le=1, description="share of the adapter in the mix")


class ClipAdapter(nn.Module):
    """ratio x adapter(z) + (1 - ratio) x z, normalised, against fixed text features."""

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        text: Tensor,
        *,
        ratio: float,
        logit_scale: float,
        class_names: tuple[str, ...],
    ) -> None:
        """Start from `down` (B, D) and `up` (D, B); `text` (K, D) stays fixed."""
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.register_buffer("text", text, persistent=False)
        self.ratio = ratio
        self.logit_scale = logit_scale
        self.class_names = class_names

    def text_features(self) -> Tensor:
        """(K, D) unit length, not trained."""
        text: Tensor = self.text  # type: ignore[assignment]
        return text

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of the adapted features of (N, D) unit features."""
        adapted = F.relu(F.linear(F.relu(F.linear(image_features, self.down)), self.up))
        mixed = F.normalize(self.ratio * adapted + (1 - self.ratio) * image_features, dim=-1)
        text = self.text_features()
        return HeadOutput(mixed @ text.T, mixed, text)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The adapter as it is now, with the text features."""
        arrays = {
            "down": base.to_numpy(self.down),
            "up": base.to_numpy(self.up),
            "text_features": base.to_numpy(self.text_features()),
        }
        settings = {"ratio": self.ratio}
        return Predictor("clip_adapter", arrays, settings, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> ClipAdapter:
    """Uniform in +-1/sqrt(fan in), as torch's linear layers start."""
    dim = context.features.shape[1]
    width = max(1, dim // config.reduction)
    device = context.features.device
    return ClipAdapter(
        base.uniform((width, dim), dim**-0.5, seed).to(device),
        base.uniform((dim, width), width**-0.5, seed + 1).to(device),
        template_features(context),
        ratio=config.ratio,
        logit_scale=context.backbone.logit_scale,
        class_names=context.class_names,
    )


def compared(
    arrays: Arrays,
    settings: Settings,
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The adapted unit features (..., D) of features (..., D), in float64."""
    hidden = np.maximum(features @ arrays["down"].T, 0)
    adapted = np.maximum(hidden @ arrays["up"].T, 0)
    ratio = rules.number(settings, "ratio")
    return rules.unit(ratio * adapted + (1 - ratio) * features)


def similarity(
    arrays: Arrays,
    settings: Settings,
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The rule of the predictor, in float64."""
    return rules.text_similarity(arrays, settings, compared(arrays, settings, features))


PLUGIN = HeadPlugin(
    Config,
    build,
    similarity,
    compared=compared,
)
