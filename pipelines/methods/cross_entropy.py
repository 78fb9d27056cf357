"""Cross-entropy for any head; a head with nothing to train is taken as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.heads import AnyHead
from pipelines.heads.linear_probe import Config as LinearProbeConfig
from pipelines.methods import coop
from pipelines.methods.base import MethodConfig, MethodPlugin


class Config(MethodConfig):
    """Cross-entropy alone."""

    name: Literal["cross_entropy"] = "cross_entropy"
    head: AnyHead = LinearProbeConfig()
    score: str = Field("max_logit", description="the selection criterion")
    needs_trainable_head: ClassVar[bool] = False
    trains_networks: ClassVar[bool] = True


PLUGIN = MethodPlugin(Config, coop.loss)
