"""PASCL: rare classes are pulled together and away from outliers, in two views of each image.

Wang 2022, "Partial and Asymmetric Contrastive Learning for Out-of-Distribution Detection in
Long-Tailed Recognition", stage 1 of its public code: cross-entropy of both views, outlier exposure,
and a supervised contrastive loss whose anchors are the images of rare classes and whose negatives
hold the outliers.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
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
    outlier_logits,
)
from pipelines.ood import classifier_losses, losses


class Config(MethodConfig):
    """Cross-entropy + exposure of outliers + contrast of rare classes."""

    name: Literal["pascl"] = "pascl"
    head: AnyHead = ClassifierConfig(train=NetworkTraining(start="random"))
    score: str = Field("msp", description="the selection criterion")
    exposure_weight: float = Field(0.5, ge=0, description="of outlier exposure")
    contrast_weight: float = Field(0.1, ge=0, description="of the contrastive loss")
    temperature: float = Field(0.07, gt=0, description="of the contrastive loss")
    tail_share: float = Field(
        0.4, ge=0, le=1, description="share of the classes, the rarest, that are anchors"
    )
    needs_outliers: ClassVar[bool] = True
    trains_networks: ClassVar[bool] = True
    needs_network: ClassVar[bool] = True
    num_views: ClassVar[int] = 2
    projection_dim: ClassVar[int] = 128
    prepares_from_logits: ClassVar[bool] = False


def prepare(config: Config, initial: Initial) -> dict[str, Tensor]:
    """Which classes are rare: those with the fewest training images, of equal ones the last."""
    assert initial.labels is not None
    counts = torch.bincount(initial.labels.cpu())
    first = math.floor((1 - config.tail_share) * len(counts) + 0.5)
    order = counts.argsort(descending=True, stable=True)
    is_tail = torch.zeros(len(counts), dtype=torch.bool)
    is_tail[order[first:]] = True
    return {"is_tail": is_tail}


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """The three terms, cross-entropy as the mean over both views."""
    views, projections = outputs.view_logits, outputs.projections
    negatives = outputs.outlier_projections
    assert views is not None
    assert projections is not None
    assert negatives is not None
    labels = batch.labels[:, None].expand(-1, views.shape[1])
    contrast = classifier_losses.tail_contrast(
        projections,
        negatives,
        labels=batch.labels,
        tail_classes=batch.prepared["is_tail"],
        temperature=config.temperature,
    )
    exposure = losses.outlier_exposure(outlier_logits(outputs))
    terms = {
        "cross_entropy": F.cross_entropy(views.float().flatten(0, 1), labels.flatten()),
        "exposure": config.exposure_weight * exposure,
        "contrast": config.contrast_weight * contrast,
    }
    return terms, {"accuracy": accuracy(outputs, batch)}


PLUGIN = MethodPlugin(Config, loss, prepare)
