"""Tip-Adapter-F: the cache's keys, started at the training features, are trained.

Zhang 2022 (Tip-Adapter), section 3.3: only the keys are trained, with AdamW at 1e-3. The public
code normalises neither the keys nor their update; nor does this.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.heads import tip_adapter
from pipelines.heads.base import HeadConfig, HeadPlugin


class Config(HeadConfig):
    """A cache whose keys are trained."""

    name: Literal["tip_adapter_f"] = "tip_adapter_f"
    alpha: float = Field(1.17, ge=0, description="weight of the cache's vote in the logits")
    beta: float = Field(1.0, gt=0, description="sharpness of the cache's affinities")
    has_text_features: ClassVar[bool] = False


PLUGIN = HeadPlugin(
    Config,
    tip_adapter.build,
    tip_adapter.similarity,
)
