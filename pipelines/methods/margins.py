"""Margins on energies, shared by the methods that move images and outliers to either side."""

from __future__ import annotations

import warnings

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipelines.methods.base import Batch, Initial, MethodConfig
from pipelines.ood.energy import free_energy, suggest_margins
from pipelines.records import Margins


class MarginConfig(MethodConfig):
    """Two margins, given together or taken from the data."""

    m_in: float | None = Field(
        None, description="images' energies are pushed below it; none: their mean at zero-shot"
    )
    m_out: float | None = Field(
        None, description="outliers' energies are pushed above it; none: their mean at zero-shot"
    )
    tau: float = Field(1.0, gt=0, description="temperature of the energies")

    @model_validator(mode="after")
    def _check_margins(self) -> MarginConfig:
        if (self.m_in is None) != (self.m_out is None):
            raise ValueError("give both m_in and m_out, or neither (then they come from the data)")
        if self.m_in is not None and self.m_out is not None and self.m_in >= self.m_out:
            raise ValueError(
                f"m_in={self.m_in} must be below m_out={self.m_out}: energies are low for images "
                "of the classes"
            )
        return self


def margins(config: MarginConfig, initial: Initial) -> Margins:
    """The margins given, or the mean energies of images and outliers before training.

    Raises:
        ValueError: where the two means are equal.
    """
    if config.m_in is not None and config.m_out is not None:
        m_in, m_out = config.m_in, config.m_out
    else:
        assert initial.outlier_logits is not None
        with warnings.catch_warnings():
            # Inverted energies are what the method is there to mend; the report shows both.
            warnings.filterwarnings("ignore", "the pretrained energies are inverted")
            m_in, m_out = suggest_margins(
                free_energy(initial.logits, config.tau),
                free_energy(initial.outlier_logits, config.tau),
            )
    return Margins(m_in=m_in, m_out=m_out)


def prepared(chosen: Margins) -> dict[str, Tensor]:
    """The margins as a method's `prepare` hands them to its loss."""
    values = {"m_in": chosen.m_in, "m_out": chosen.m_out}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def prepared_margins(batch: Batch) -> Margins:
    """The margins that `prepared` handed on."""
    return Margins(m_in=float(batch.prepared["m_in"]), m_out=float(batch.prepared["m_out"]))


def mean_energies(logits: Tensor, outliers: Tensor, tau: float) -> dict[str, float]:
    """Mean energy of the images and of the outliers of a step, for the report."""
    with torch.no_grad():
        return {
            "energy": float(free_energy(logits, tau).mean()),
            "outlier_energy": float(free_energy(outliers, tau).mean()),
        }
