"""A linear classifier on image features.

Radford 2021 (CLIP), section 3.2, by gradient steps instead of L-BFGS. The weights act on
similarities: similarity = W z + b and logits = similarity x logit_scale, so that a score sees
the same two quantities as with any head. W and b start at zero, or with `init: text` at the
zero-shot text features (Wortsman 2022, WiSE-FT), which is then energy fine-tuning of a
pretrained classifier.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.config import UserError
from pipelines.heads import base, rules
from pipelines.heads.base import HeadConfig, HeadContext, HeadOutput, HeadPlugin, Predictor
from pipelines.heads.zero_shot import template_features


class Config(HeadConfig):
    """A linear classifier."""

    name: Literal["linear_probe"] = "linear_probe"
    init: Literal["zero", "text"] = Field("zero", description="start at 0 or at zero-shot")
    has_text_features: ClassVar[bool] = False


class LinearProbe(nn.Module):
    """similarity = W z + b."""

    def __init__(self, weight: Tensor, logit_scale: float, class_names: tuple[str, ...]) -> None:
        """Start from `weight` (K, D) and a zero bias."""
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(torch.zeros(len(weight), device=weight.device))
        self.logit_scale = logit_scale
        self.class_names = class_names

    def text_features(self) -> Tensor:
        """Refused: the rows of W are no text features.

        Raises:
            UserError: always.
        """
        raise UserError("head=linear_probe has no text features")

    def encode(self, image_features: Tensor) -> HeadOutput:
        """W z + b of (N, D) unit features."""
        return HeadOutput(F.linear(image_features, self.weight, self.bias), image_features)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The classifier as it is now."""
        arrays = {"weight": base.to_numpy(self.weight), "bias": base.to_numpy(self.bias)}
        return Predictor("linear_probe", arrays, {}, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> LinearProbe:  # noqa: ARG001
    """Zero weights, or the zero-shot classifier's; `seed` changes nothing."""
    weight = (
        template_features(context)
        if config.init == "text"
        else context.features.new_zeros(len(context.class_names), context.features.shape[1])
    )
    return LinearProbe(weight, context.clip.logit_scale, context.class_names)


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.weight_similarity,
    linear=rules.weight_rule,
)
