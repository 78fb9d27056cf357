"""OECC: confidence held near the accuracy, outliers uniform; fine-tuning of a whole network.

Papadopoulos 2021, "Outlier exposure with confidence control for out-of-distribution detection".
Both terms are sums over the batch, as in the authors' code, so their weights belong to its sizes:
0.07 for 128 images and 0.05 for 256 outliers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipelines.backbones.network_training import NetworkTraining
from pipelines.heads import AnyHead
from pipelines.heads.classifier import Config as ClassifierConfig
from pipelines.methods.base import (
    Batch,
    Initial,
    Losses,
    MethodConfig,
    MethodPlugin,
    Outputs,
    accuracy,
    cross_entropy,
    outlier_logits,
)
from pipelines.ood import classifier_losses as maths


class Config(MethodConfig):
    """Cross-entropy + two sums: of squared confidence gaps, and of outliers' deviations."""

    name: Literal["oecc"] = "oecc"
    head: AnyHead = ClassifierConfig(train=NetworkTraining(start="backbone"))
    score: str = Field("msp", description="the selection criterion")
    confidence_weight: float = Field(
        0.07, ge=0, description="of the sum of (confidence - train_accuracy)^2 over the images"
    )
    outlier_weight: float = Field(
        0.05, ge=0, description="of the sum of |p_k - 1/K| over outliers and classes"
    )
    train_accuracy: float | None = Field(
        None, ge=0, le=1, description="none: that of the backbone before training"
    )
    needs_outliers: ClassVar[bool] = True
    trains_networks: ClassVar[bool] = True
    needs_network: ClassVar[bool] = True


def prepare(config: Config, initial: Initial) -> dict[str, Tensor]:
    """The training accuracy that confidence is held near."""
    assert initial.labels is not None
    right = initial.logits.argmax(dim=1).cpu() == initial.labels.cpu()
    measured = right.double().mean()
    given = config.train_accuracy
    return {"train_accuracy": measured if given is None else measured.new_tensor(given)}


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the images, both sums with their weights."""
    target = float(batch.prepared["train_accuracy"])
    confidence = maths.confidence_control(outputs.logits.float(), target)
    deviation = maths.uniform_deviation(outlier_logits(outputs))
    losses = {
        "cross_entropy": cross_entropy(outputs, batch),
        "confidence": config.confidence_weight * confidence,
        "deviation": config.outlier_weight * deviation,
    }
    return losses, {"accuracy": accuracy(outputs, batch)}


PLUGIN = MethodPlugin(Config, loss, prepare)
