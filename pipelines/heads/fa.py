"""Forced prompts: each class's learned prompt beside the frozen one that it began as.

Du 2025, "FA: Forced Prompt Learning of Vision-Language Models for Out-of-Distribution Detection"
(public code: 0xFAFA/FA). The forced prompt is CoOp's; the original one is the same prompt before
any update, "a photo of a NAME." by default, and stays. The original one counts `coefficient` times
(the forced coefficient, K in the public code), both where the forced one learns and where images
are judged, so an image is compared with (1 + coefficient) x K prompts. Classes are predicted by
the forced prompts alone. With coefficient 0 it is CoOp.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

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
from pipelines.heads.coop import CoOp

# Array of the frozen prompts' features (K, D), and row of the images' similarities to them.
ORIGINAL = "original_text_features"
ORIGINAL_SIMILARITY = "original_similarity"


class Config(HeadConfig):
    """Learned prompts beside frozen ones."""

    name: Literal["fa"] = "fa"
    prompt: coop.Config = Field(
        coop.Config(num_context=4, init_phrase="a photo of a"),
        description="the forced prompts, CoOp's settings; the original ones are their beginning",
    )
    coefficient: int = Field(3, ge=0, description="how often the original prompts count; 0 is CoOp")


class FA(nn.Module):
    """A learned context in front of a frozen text tower, and what it gave before it learned."""

    def __init__(self, forced: CoOp, coefficient: int) -> None:
        """Keep the prompts, which must be as they begin."""
        super().__init__()
        self.forced = forced
        self.coefficient = coefficient
        self.logit_scale = forced.logit_scale
        self.class_names = forced.class_names
        with torch.no_grad():
            self.register_buffer("original", forced.text_features(), persistent=False)

    def text_features(self) -> Tensor:
        """(K, D) unit length, of the forced prompts."""
        return self.forced.text_features()

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with the forced prompts.

        `rows["original_similarity"]` (N, K): those with the original ones, where they count.
        """
        text = self.text_features()
        original: Tensor = self.original  # type: ignore[assignment]
        rows = {ORIGINAL_SIMILARITY: image_features @ original.T} if self.coefficient else {}
        return HeadOutput(image_features @ text.T, image_features, text, rows=rows)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, (1 + coefficient) K), as the predictor gives it."""
        encoded = self.encode(image_features)
        copies = [encoded.rows[ORIGINAL_SIMILARITY]] * self.coefficient if self.coefficient else []
        return torch.cat([encoded.similarity, *copies], dim=1)

    def predictor(self) -> Predictor:
        """The product with the forced prompts as they are now, and with the original ones."""
        with torch.no_grad():
            arrays = {"text_features": base.to_numpy(self.text_features())}
        original: Tensor = self.original  # type: ignore[assignment]
        arrays[ORIGINAL] = base.to_numpy(original)
        settings = {"coefficient": self.coefficient}
        return Predictor("fa", arrays, settings, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> FA:
    """Prompts of the context's classes.

    Raises:
        UserError: where a prompt is longer than the text tower takes.
    """
    return FA(coop.build(config.prompt, context, seed), config.coefficient)


def similarity(
    arrays: Arrays, settings: Settings, features: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cosines (..., (1 + coefficient) K) of images (N, D) or local features (N, P, D).

    Those with the K forced prompts first, then `coefficient` times those with the original ones.
    """
    forced, original = (features @ arrays[name].T for name in ("text_features", ORIGINAL))
    copies = int(rules.number(settings, "coefficient"))
    return np.concatenate((forced, *(original,) * copies), axis=-1)


PLUGIN = HeadPlugin(
    Config,
    build,
    similarity,
    compared=rules.unchanged,
    local_similarity=similarity,
)
