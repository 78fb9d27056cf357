"""The zero-shot head: text features of filled templates, nothing to train.

Radford 2021 (CLIP), section 3.1.4: the unit features of a class's prompts are averaged and
normalised again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from pipelines.backbones.class_texts import refuse_equal_features
from pipelines.backbones.templates import prompts
from pipelines.heads import rules
from pipelines.heads.base import HeadConfig, HeadContext, HeadOutput, HeadPlugin, Predictor


class Config(HeadConfig):
    """Text features of the benchmark's class names in its templates."""

    name: Literal["zero_shot"] = "zero_shot"
    templates: list[str] | None = Field(
        None, description="prompts with {} for the class name; none: the benchmark's"
    )
    trainable: ClassVar[bool] = False

    @field_validator("templates")
    @classmethod
    def _with_a_place(cls, templates: list[str] | None) -> list[str] | None:
        if templates == [] or any("{}" not in template for template in templates or ()):
            raise ValueError("each template needs {} where the class name goes")
        return templates


class ZeroShot(nn.Module):
    """Similarity to fixed text features (K, D)."""

    def __init__(self, text: Tensor, logit_scale: float, class_names: tuple[str, ...]) -> None:
        """Keep the unit text features of the classes."""
        super().__init__()
        self.register_buffer("text", text, persistent=False)
        self.logit_scale = logit_scale
        self.class_names = class_names

    def text_features(self) -> Tensor:
        """(K, D) unit length."""
        text: Tensor = self.text  # type: ignore[assignment]
        return text

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with every class."""
        text = self.text_features()
        return HeadOutput(image_features @ text.T, image_features, text)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The product with the text features."""
        text = self.text_features()
        return rules.text_predictor("zero_shot", text, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> ZeroShot:  # noqa: ARG001
    """Encode the classes' prompts; `seed` changes nothing."""
    chosen = tuple(config.templates or context.templates)
    text = template_features(replace(context, templates=chosen))
    return ZeroShot(text, context.clip.logit_scale, context.class_names)


def template_features(context: HeadContext) -> Tensor:
    """(K, D) unit text features, each the normalised mean over the templates."""
    with torch.no_grad():
        flat = context.clip.encode_text(prompts(context.class_names, context.templates)).float()
    means = flat.reshape(len(context.class_names), -1, flat.shape[-1]).mean(dim=1)
    text = F.normalize(means, dim=-1)
    refuse_equal_features(text, context.class_names)
    return text.to(context.features.device)


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.text_similarity,
    compared=rules.unchanged,
    linear=rules.text_rule,
)
