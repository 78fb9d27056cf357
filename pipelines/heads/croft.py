"""CRoFT's head: a linear adapter on each side, mixed with the features themselves.

Zhu 2024 (CRoFT, arXiv 2405.16417), section 3.3; public code: LinLLLL/CRoFT. Image features become
ratio x A z + (1 - ratio) x z and text features likewise, both normalised; A and its counterpart
start as the identity, so training starts at zero-shot. The generator of covariate-shifted features,
z + G z normalised, belongs to the training alone and is not saved. `pipelines.methods.croft` holds
the losses.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
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
    """Linear adapters on image and text features."""

    name: Literal["croft"] = "croft"
    image_ratio: float = Field(0.2, ge=0, le=1, description="share of the adapter, image side")
    text_ratio: float = Field(0.5, ge=0, le=1, description="share of the adapter, text side")


class CRoFT(nn.Module):
    """Adapters (D, D) for images and texts, and the generator (D, D) of shifted features."""

    def __init__(
        self, config: Config, text: Tensor, logit_scale: float, class_names: tuple[str, ...]
    ) -> None:
        """Start at the identity; `text` (K, D) are the zero-shot text features."""
        super().__init__()
        self.config = config
        self.logit_scale = logit_scale
        self.class_names = class_names
        identity = torch.eye(text.shape[1], device=text.device)
        self.image_adapter = nn.Parameter(identity.clone())
        self.text_adapter = nn.Parameter(identity.clone())
        self.generator = nn.Parameter(identity.clone())
        self.register_buffer("text", text, persistent=False)

    def text_features(self) -> Tensor:
        """(K, D) unit length, adapted."""
        text: Tensor = self.text  # type: ignore[assignment]
        return adapt(text, self.text_adapter, self.config.text_ratio)

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of adapted features; the losses get the features and matrices as they are."""
        adapted = adapt(image_features, self.image_adapter, self.config.image_ratio)
        text = self.text_features()
        extra = {
            "image_adapter": self.image_adapter,
            "text_adapter": self.text_adapter,
            "generator": self.generator,
            "text": self.text,
        }
        rows = {"features": image_features}
        return HeadOutput(adapted @ text.T, adapted, text, extra=extra, rows=rows)  # type: ignore[arg-type]

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The image adapter as it is now, with the adapted text features."""
        arrays = {
            "image_adapter": base.to_numpy(self.image_adapter),
            "text_features": base.to_numpy(self.text_features()),
        }
        settings = {"image_ratio": self.config.image_ratio}
        return Predictor("croft", arrays, settings, self.logit_scale, self.class_names)


def adapt(features: Tensor, adapter: Tensor, ratio: float) -> Tensor:
    """Mix each row z of (N, D) with A z: ratio x A z + (1 - ratio) x z, of unit length."""
    return F.normalize(ratio * (features @ adapter.T) + (1 - ratio) * features, dim=-1)


def build(config: Config, context: HeadContext, seed: int) -> CRoFT:  # noqa: ARG001
    """Identities; `seed` changes nothing."""
    text = template_features(context)
    return CRoFT(config, text, context.clip.logit_scale, context.class_names)


def compared(
    arrays: Arrays,
    settings: Settings,
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The adapted unit features (..., D) of features (..., D), in float64."""
    ratio = rules.number(settings, "image_ratio")
    return rules.unit(ratio * (features @ arrays["image_adapter"].T) + (1 - ratio) * features)


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
