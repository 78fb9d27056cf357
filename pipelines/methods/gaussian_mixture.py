"""The class-conditional Gaussian mixture alone: Lafon 2022's ablation without the network.

Nothing is trained but the head, if it has anything to train: the mixture has a closed form. It
ranks like SSD (Sehwag 2021). As a score, `gaussian_mixture` judges every other head too.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.heads import AnyHead
from pipelines.heads.zero_shot import Config as ZeroShotConfig
from pipelines.methods.base import Batch, Losses, MethodConfig, MethodPlugin, Outputs, cross_entropy


class Config(MethodConfig):
    """The mixture."""

    name: Literal["gaussian_mixture"] = "gaussian_mixture"
    head: AnyHead = ZeroShotConfig()
    score: str = Field("gaussian_mixture", description="the selection criterion")
    T_G: float = Field(1e3, gt=0, description="temperature; it changes no ranking")
    weighted: bool = Field(False, description="with the classes' shares")
    shrinkage: float | None = Field(
        None, ge=0, le=1, description="of the covariance; null: only where it is singular"
    )
    needs_trainable_head: ClassVar[bool] = False


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:  # noqa: ARG001
    """Cross-entropy, where the head has anything to train."""
    return {"cross_entropy": cross_entropy(outputs, batch)}, {}


PLUGIN = MethodPlugin(Config, loss)
