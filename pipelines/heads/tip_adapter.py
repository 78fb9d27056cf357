"""Tip-Adapter: a cache of training features votes beside the zero-shot prompts; no training.

Zhang 2022 (Tip-Adapter), equations 3 to 6: logits = logit_scale x z . h + alpha x
exp(-beta (1 - z F^T)) L, with F the training features and L their one-hot classes. Alpha 1.17 and
beta 1 are the public code's; its cache averages ten augmented views, ours holds the cached
feature of each image. As for every head, similarity = logits / logit_scale.
`tip_adapter_f` trains the keys F.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from pipelines.config import UserError
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
    """A cache of training features beside the prompts."""

    name: Literal["tip_adapter"] = "tip_adapter"
    alpha: float = Field(1.17, ge=0, description="weight of the cache's vote in the logits")
    beta: float = Field(1.0, gt=0, description="sharpness of the cache's affinities")
    trainable: ClassVar[bool] = False
    # Its similarity is no product with text features alone.
    has_text_features: ClassVar[bool] = False


class TipAdapter(nn.Module):
    """Zero-shot similarity plus the vote of a cache."""

    def __init__(
        self,
        config: Any,
        keys: Tensor,
        labels: Tensor,
        text: Tensor,
        *,
        logit_scale: float,
        class_names: tuple[str, ...],
    ) -> None:
        """Keep keys (N, D) with their classes (N,), and unit text features (K, D)."""
        super().__init__()
        self.config = config
        if type(config).trainable:
            self.keys: Tensor = nn.Parameter(keys.clone())
        else:
            self.register_buffer("keys", keys, persistent=False)
        votes = F.one_hot(labels, len(class_names)).float()
        self.register_buffer("votes", votes, persistent=False)
        self.register_buffer("text", text, persistent=False)
        self.logit_scale = logit_scale
        self.class_names = class_names

    def text_features(self) -> Tensor:
        """Refused: the similarity also counts the cache.

        Raises:
            UserError: always.
        """
        raise UserError(f"head={self.config.name}: its similarity is more than text features")

    def encode(self, image_features: Tensor) -> HeadOutput:
        """(z . h) + alpha x vote / logit_scale of (N, D) unit features."""
        votes: Tensor = self.votes  # type: ignore[assignment]
        text: Tensor = self.text  # type: ignore[assignment]
        affinity = torch.exp(self.config.beta * (image_features @ self.keys.T - 1))
        vote = affinity @ votes * (self.config.alpha / self.logit_scale)
        return HeadOutput(image_features @ text.T + vote, image_features)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """Cache and text features as they are now."""
        arrays = {
            "keys": base.to_numpy(self.keys),
            "votes": base.to_numpy(self.votes),  # type: ignore[arg-type]
            "text_features": base.to_numpy(self.text),  # type: ignore[arg-type]
        }
        settings = {
            "alpha": self.config.alpha,
            "beta": self.config.beta,
            "logit_scale": self.logit_scale,
        }
        name = self.config.name
        return Predictor(name, arrays, settings, self.logit_scale, self.class_names)


def build(config: Any, context: HeadContext, seed: int) -> TipAdapter:  # noqa: ARG001
    """A cache of the training features; `seed` changes nothing."""
    return TipAdapter(
        config,
        context.features,
        context.labels,
        template_features(context),
        logit_scale=context.clip.logit_scale,
        class_names=context.class_names,
    )


def similarity(
    arrays: Arrays,
    settings: Settings,
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The rule of the predictor, in float64."""
    alpha, beta, scale = (rules.number(settings, name) for name in ("alpha", "beta", "logit_scale"))
    affinity = np.exp(beta * (features @ arrays["keys"].T - 1))
    vote = affinity @ arrays["votes"] * (alpha / scale)
    product: NDArray[np.float64] = features @ arrays["text_features"].T + vote
    return product


PLUGIN = HeadPlugin(
    Config,
    build,
    similarity,
)
