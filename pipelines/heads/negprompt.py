"""NegPrompt: beside each class's learned prompt, prompts of what the class is not.

Li 2024, "Learning Transferable Negative Prompts for Out-of-Distribution Detection" (public code:
mala-lab/NegPrompt). The positive prompts are CoOp's. Each negative context, N(0, 0.02) and as
long as the positive one, is shared by the classes and stands before every class name, so a
class has `num_negative` negative prompts. Classes are predicted by the positive prompts alone;
the scores neg_label and neg_mcm compare images with the negative ones instead of stored words.
All prompts learn at once, or in the public code's two stages: the positive prompts alone, then
the negative ones, which begin at the positive ones +- 1e-5, with those frozen.
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

# Half the width of the interval around the positive context in which a negative one begins.
START_NOISE = 1e-5


class Config(HeadConfig):
    """Learned prompts, and negative ones."""

    name: Literal["negprompt"] = "negprompt"
    prompt: coop.Config = Field(coop.Config(), description="the positive prompts, CoOp's settings")
    num_negative: int = Field(2, ge=1, description="negative prompts a class")


class NegPrompt(nn.Module):
    """One positive and M negative learned contexts in front of a frozen text tower."""

    def __init__(self, positive: CoOp, negatives: list[CoOp], seed: int = 0) -> None:
        """Keep the prompts, each with a context of its own; `seed` draws where a stage begins."""
        super().__init__()
        self.positive = positive
        self.negatives = nn.ModuleList(negatives)
        self.logit_scale = positive.logit_scale
        self.class_names = positive.class_names
        self.seed = seed
        self.stage: int | None = None  # None: all prompts learn at once

    def enter_stage(self, stage: int, *, begins: bool) -> None:
        """Stage 0 learns the positive prompts, stage 1 the negative ones, from these +- 1e-5."""
        self.stage = stage
        start = self.positive.context.requires_grad_(stage == 0)
        for number, prompt in enumerate(self.negatives):
            context: Tensor = prompt.context  # type: ignore[assignment]
            context.requires_grad_(stage == 1)
            if stage == 1 and begins:
                noise = base.uniform(tuple(start.shape), START_NOISE, self.seed + 1 + number)
                context.detach().copy_(start + noise.to(start))

    def text_features(self) -> Tensor:
        """(K, D) unit length, of the positive prompts."""
        return self.positive.text_features()

    def negative_features(self) -> Tensor:
        """(K, M, D) unit length, of the negative prompts."""
        return torch.stack([prompt.text_features() for prompt in self.negatives], dim=1)  # type: ignore[operator]

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with the positive prompts.

        `extra["negatives"]` (K, M, D): the negative prompts, where a step learns them.
        """
        text = self.text_features()
        learns_negatives = torch.is_grad_enabled() and self.stage != 0
        extra = {"negatives": self.negative_features()} if learns_negatives else {}
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
    return NegPrompt(positive, negatives, seed)


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.text_similarity,
    compared=rules.unchanged,
)
