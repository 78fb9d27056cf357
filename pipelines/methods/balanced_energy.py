"""Balanced energy: outliers that look like a frequent class are pushed harder.

Choi 2023, Algorithm 1: first a pass over the outliers counts which class the
pretrained model (here the zero-shot prompts) takes each for; the share of each class is the
prior. Then energy margins, in which an outlier's weight and margin follow the prior of the
classes it looks like. alpha = gamma = 0 is `energy_margin`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipelines.heads import AnyHead
from pipelines.heads.coop import Config as CoOpConfig
from pipelines.methods.base import (
    Batch,
    Initial,
    Losses,
    MethodPlugin,
    Outputs,
    accuracy,
    cross_entropy,
    outlier_logits,
)
from pipelines.methods.margins import (
    MarginConfig,
    margins,
    mean_energies,
    prepared,
    prepared_margins,
)
from pipelines.ood.energy import outlier_counts, prior
from pipelines.ood.losses import balanced_energy_margin


class Config(MarginConfig):
    """Cross-entropy + weight x balanced margins on the energies."""

    name: Literal["balanced_energy"] = "balanced_energy"
    head: AnyHead = CoOpConfig()
    score: str = Field("energy", description="the selection criterion")
    weight: float = Field(0.1, ge=0, description="of the margin loss; 0 is cross-entropy")
    alpha: float | None = Field(
        None,
        ge=0,
        description="how far Z moves an outlier's margin; null: the number of classes, as "
        "published for 10 and 100",
    )
    gamma: float = Field(0.05, ge=0, description="power of the prior in Z; 0: uniform")
    reduction: Literal["weighted", "mean"] = Field(
        "weighted", description="outlier term divided by the sum of Z, or a plain mean"
    )
    needs_outliers: ClassVar[bool] = True
    needs_outlier_counts: ClassVar[bool] = True
    trains_networks: ClassVar[bool] = True


def prepare(config: Config, initial: Initial) -> dict[str, Tensor]:
    """The margins, and the prior over the classes that outliers are taken for."""
    counts = initial.outlier_counts
    if counts is None:
        assert initial.outlier_logits is not None
        counts = outlier_counts(initial.outlier_logits)
    return {**prepared(margins(config, initial)), "prior": prior(counts)}


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the images, weighted balanced hinges of both energies."""
    logits, outliers = outputs.logits.float(), outlier_logits(outputs)
    limits = prepared_margins(batch)
    alpha = float(logits.shape[1]) if config.alpha is None else config.alpha
    margin = balanced_energy_margin(
        logits,
        outliers,
        batch.prepared["prior"],
        limits.m_in,
        limits.m_out,
        alpha,
        config.gamma,
        config.tau,
        config.reduction,
    )
    losses = {"cross_entropy": cross_entropy(outputs, batch), "margin": config.weight * margin}
    report = {"accuracy": accuracy(outputs, batch), "margin": float(margin.detach())}
    return losses, {**report, **mean_energies(logits, outliers, config.tau)}


PLUGIN = MethodPlugin(Config, loss, prepare)
