"""NegPrompt: beside each class's learned prompt, prompts of what the class is not.

Li 2024, "Learning Transferable Negative Prompts for Out-of-Distribution Detection" (public code:
mala-lab/NegPrompt). The positive prompts are CoOp's. Each negative context, N(0, 0.02) and as
long as the positive one, is shared by the classes and stands before every class name, so a
class has `num_negative` negative prompts. Classes are predicted by the positive prompts alone;
the score neg_label compares images with the negative ones instead of stored words.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.heads import base, coop, rules
from pipelines.heads.base import HeadConfig, HeadContext, HeadOutput, HeadPlugin, Predictor
from pipelines.heads.comparisons import LEARNED_NEGATIVES
from pipelines.heads.coop import CoOp


class Config(HeadConfig):
    """Learned prompts, and negative ones."""

    name: Literal["negprompt"] = "negprompt"
    prompt: coop.Config = Field(coop.Config(), description="the positive prompts, CoOp's settings")
    num_negative: int = Field(2, ge=1, description="negative prompts a class")


class NegPrompt(nn.Module):
    """One positive and M negative learned contexts in front of a frozen text tower."""

    def __init__(self, positive: CoOp, negatives: list[CoOp]) -> None:
        """Keep the prompts; each has a context of its own."""
        super().__init__()
        self.positive = positive
        self.negatives = nn.ModuleList(negatives)
        self.logit_scale = positive.logit_scale
        self.class_names = positive.class_names

    def text_features(self) -> Tensor:
        """(K, D) unit length, of the positive prompts."""
        return self.positive.text_features()

    def negative_features(self) -> Tensor:
        """(K, M, D) unit length, of the negative prompts."""
        return torch.stack([prompt.text_features() for prompt in self.negatives], dim=1)  # type: ignore[operator]

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with the positive prompts; `extra["negatives"]`."""
        text = self.text_features()
        extra = {"negatives": self.negative_features()} if torch.is_grad_enabled() else {}
        return HeadOutput(image_features @ text.T, image_features, text, extra)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The product with the positive prompts as they are now, and the negative ones."""
        with torch.no_grad():
            arrays = {
                "text_features": base.to_numpy(self.text_features()),
                LEARNED_NEGATIVES: base.to_numpy(self.negative_features().flatten(0, 1)),
            }
        return Predictor("negprompt", arrays, {}, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> NegPrompt:
    """Prompts of the context's classes.

    Raises:
        UserError: where a prompt is longer than the text tower takes.
    """
    positive = coop.build(config.prompt, context, seed)
    # From the same phrase, all negatives would begin, and stay, the same as each other.
    length = positive.context.shape[-2]
    random = config.prompt.model_copy(update={"init_phrase": None, "num_context": length})
    negatives = [
        coop.build(random, context, seed + 1 + number) for number in range(config.num_negative)
    ]
    return NegPrompt(positive, negatives)


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.text_similarity,
    compared=rules.unchanged,
)
