"""No training: the backbone's own prompts, judged like any trained head. Radford 2021 (CLIP)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.heads import AnyHead
from pipelines.heads.zero_shot import Config as ZeroShotConfig
from pipelines.methods.base import Batch, Losses, MethodConfig, MethodPlugin, Outputs, cross_entropy


class Config(MethodConfig):
    """The zero-shot head as it is."""

    name: Literal["zero_shot"] = "zero_shot"
    head: AnyHead = ZeroShotConfig()
    score: str = Field("mcm", description="the selection criterion")
    needs_trainable_head: ClassVar[bool] = False

    @model_validator(mode="after")
    def _train_nothing(self) -> Config:
        if self.head.trainable:
            raise ValueError(
                f"head={self.head.name} is there to be trained, which method=zero_shot never "
                "does; use name=cross_entropy"
            )
        if self.adjust_logits:
            raise ValueError(
                f"adjust_logits={self.adjust_logits}: zero-shot prompts have learned no class "
                "shares to correct; it is for trained heads"
            )
        return self


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:  # noqa: ARG001
    """Cross-entropy, should the head have anything to train."""
    return {"cross_entropy": cross_entropy(outputs, batch)}, {}


PLUGIN = MethodPlugin(Config, loss)
