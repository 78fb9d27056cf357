"""DPLCLIP: prompts made from a domain's mean feature, trained with cross-entropy. Zhang 2021."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.heads import AnyHead
from pipelines.heads.dplclip import Config as DPLCLIPConfig
from pipelines.methods import coop
from pipelines.methods.base import MethodConfig, MethodPlugin


class Config(MethodConfig):
    """Cross-entropy alone."""

    name: Literal["dplclip"] = "dplclip"
    head: AnyHead = DPLCLIPConfig()
    score: str = Field("mcm", description="the selection criterion")


PLUGIN = MethodPlugin(Config, coop.loss)
