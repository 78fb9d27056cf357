"""Open-Sampling: outliers are given labels that are drawn anew each step, rare classes most.

Wei 2022, "Open-Sampling: Exploring Out-of-Distribution Data for Re-balancing Long-Tailed
Datasets". A label follows the complementary distribution of the classes' shares in training; the
same distribution weighs the outliers' cross-entropy.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
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
from pipelines.ood.seeds import generator


class Config(MethodConfig):
    """Cross-entropy + weight x weighted cross-entropy of outliers to drawn labels."""

    name: Literal["open_sampling"] = "open_sampling"
    head: AnyHead = ClassifierConfig(train=NetworkTraining(start="random"))
    score: str = Field("msp", description="the selection criterion")
    weight: float = Field(1.0, ge=0, description="of the outliers' loss; 0 is cross-entropy")
    needs_outliers: ClassVar[bool] = True
    trains_networks: ClassVar[bool] = True
    needs_network: ClassVar[bool] = True
    prepares_from_logits: ClassVar[bool] = False


def prepare(config: Config, initial: Initial) -> dict[str, Tensor]:  # noqa: ARG001
    """The complementary distribution of the classes' shares in training."""
    assert initial.labels is not None
    counts = torch.bincount(initial.labels.cpu()).double()
    return {"drawn_from": maths.complementary_distribution(counts / counts.sum())}


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the images, weighted cross-entropy of the outliers."""
    outliers, shares = outlier_logits(outputs), batch.prepared["drawn_from"]
    drawn = maths.draw_labels(shares, len(outliers), generator=generator(batch.seed))
    weights = shares.to(outliers) * len(shares)
    drawn = drawn.to(outliers.device)
    sampling = maths.open_sampling(outliers, drawn, class_weights=weights)
    losses = {"cross_entropy": cross_entropy(outputs, batch), "sampling": config.weight * sampling}
    return losses, {"accuracy": accuracy(outputs, batch), "sampling": float(sampling.detach())}


PLUGIN = MethodPlugin(Config, loss, prepare)
