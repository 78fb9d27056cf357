"""Energy fine-tuning: energies of images below one margin, of outliers above another.

Liu 2020, equations 7 to 9, with the single-hinge ablation of its footnote 2.
Published margins belong to one network's logits, so by default they are the mean energies that
the zero-shot prompts give to images and outliers.
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
from pipelines.ood import losses as maths


class Config(MarginConfig):
    """Cross-entropy + weight x margins on the energies."""

    name: Literal["energy_margin"] = "energy_margin"
    head: AnyHead = CoOpConfig()
    score: str = Field("energy", description="the selection criterion")
    weight: float = Field(0.1, ge=0, description="of the margin loss; 0 is cross-entropy")
    hinge: Literal["double", "single"] = Field(
        "double", description="single: one hinge on the gap of the batch means, m_out - m_in"
    )
    needs_outliers: ClassVar[bool] = True
    trains_networks: ClassVar[bool] = True


def prepare(config: Config, initial: Initial) -> dict[str, Tensor]:
    """The margins: those given, or the mean energies of images and outliers."""
    return prepared(margins(config, initial))


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the images, weighted hinges of both energies."""
    limits = prepared_margins(batch)
    logits, outliers = outputs.logits.float(), outlier_logits(outputs)
    if config.hinge == "double":
        margin = maths.energy_margin(logits, outliers, limits.m_in, limits.m_out, config.tau)
    else:
        margin = maths.energy_single_margin(logits, outliers, limits.m_out - limits.m_in)
    losses = {"cross_entropy": cross_entropy(outputs, batch), "margin": config.weight * margin}
    report = {"accuracy": accuracy(outputs, batch), "margin": float(margin.detach())}
    return losses, {**report, **mean_energies(logits, outliers, config.tau)}


PLUGIN = MethodPlugin(Config, loss, prepare)
