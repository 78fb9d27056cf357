"""CoOp: learned prompts trained with cross-entropy, judged by MCM. Zhou 2022, equation 3."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.heads import AnyHead
from pipelines.heads.coop import Config as CoOpConfig
from pipelines.methods.base import (
    Batch,
    Losses,
    MethodConfig,
    MethodPlugin,
    Outputs,
    accuracy,
    cross_entropy,
)


class Config(MethodConfig):
    """Cross-entropy alone."""

    name: Literal["coop"] = "coop"
    head: AnyHead = CoOpConfig()
    score: str = Field("mcm", description="the selection criterion")


def loss(outputs: Outputs, batch: Batch, config: MethodConfig) -> Losses:  # noqa: ARG001
    """Cross-entropy of the logits, similarity x logit_scale."""
    return {"cross_entropy": cross_entropy(outputs, batch)}, {"accuracy": accuracy(outputs, batch)}


PLUGIN = MethodPlugin(Config, loss)
