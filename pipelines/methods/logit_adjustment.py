"""Logit adjustment: cross-entropy of logits to which the log of the classes' shares is added.

Menon 2021, "Long-tail learning via logit adjustment", equation 10. Fine-tuning the normalisation
layers and the last layer of PASCL's network by it is stage 2 of Wang 2022, "auxiliary branch
finetuning" (`conf/method/pascl_branch.yaml`).
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
)
from pipelines.ood.classifier_losses import adjusted_cross_entropy


class Config(MethodConfig):
    """Cross-entropy of f + tau log p."""

    name: Literal["logit_adjustment"] = "logit_adjustment"
    head: AnyHead = ClassifierConfig(train=NetworkTraining(start="random"))
    score: str = Field("msp", description="the selection criterion")
    tau: float = Field(1.0, ge=0, description="strength of the adjustment; 0 is cross-entropy")
    trains_networks: ClassVar[bool] = True
    needs_network: ClassVar[bool] = True
    prepares_from_logits: ClassVar[bool] = False


def prepare(config: Config, initial: Initial) -> dict[str, Tensor]:  # noqa: ARG001
    """The classes' shares of the training images."""
    assert initial.labels is not None
    counts = torch.bincount(initial.labels.cpu()).double()
    return {"class_prior": counts / counts.sum()}


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """The adjusted cross-entropy; the accuracy reported is that of the logits as they are."""
    adjusted = adjusted_cross_entropy(
        outputs.logits, batch.labels, batch.prepared["class_prior"], config.tau
    )
    return {"adjusted_cross_entropy": adjusted}, {"accuracy": accuracy(outputs, batch)}


PLUGIN = MethodPlugin(Config, loss, prepare)
