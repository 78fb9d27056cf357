"""Outlier exposure: outliers are taught the uniform distribution. Hendrycks 2019, section 3."""

from __future__ import annotations

from typing import ClassVar, Literal

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
    outlier_logits,
)
from pipelines.ood import losses as maths


class Config(MethodConfig):
    """Cross-entropy + weight x cross-entropy of outliers to the uniform distribution."""

    name: Literal["outlier_exposure"] = "outlier_exposure"
    head: AnyHead = CoOpConfig()
    score: str = Field("msp", description="the selection criterion")
    weight: float = Field(0.5, ge=0, description="of the outliers' loss; 0 is cross-entropy")
    needs_outliers: ClassVar[bool] = True
    trains_networks: ClassVar[bool] = True


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the images, weighted uniformity of the outliers."""
    exposure = maths.outlier_exposure(outlier_logits(outputs))
    losses = {"cross_entropy": cross_entropy(outputs, batch), "exposure": config.weight * exposure}
    return losses, {"accuracy": accuracy(outputs, batch), "exposure": float(exposure.detach())}


PLUGIN = MethodPlugin(Config, loss)
