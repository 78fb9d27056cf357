"""CoCoOp: prompts that depend on the image, trained with cross-entropy. Zhou 2022, equation 4."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.heads import AnyHead
from pipelines.heads.cocoop import Config as CoCoOpConfig
from pipelines.methods import coop
from pipelines.methods.base import MethodConfig, MethodPlugin, TrainingConfig


class Config(MethodConfig):
    """Cross-entropy alone, in small batches and few epochs, since a step is text per image."""

    name: Literal["cocoop"] = "cocoop"
    head: AnyHead = CoCoOpConfig()
    score: str = Field("mcm", description="the selection criterion")
    training: TrainingConfig = TrainingConfig(epochs=10, batch_size=4)


PLUGIN = MethodPlugin(Config, coop.loss)
