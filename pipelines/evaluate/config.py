"""The sections `evaluate`, `threshold` and `compare`: how figures are made and compared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Section
from pipelines.records import Known


class EvaluateConfig(Section):
    """How sure the tables are."""

    num_resamples: int = Field(1000, ge=100, description="bootstrap resamples of an interval")


class ThresholdConfig(Section):
    """How a threshold follows from the scores of ID validation images."""

    # As `pipelines.ood.conformal.ThresholdRule`, which imports more than a wrong word may wait for.
    rule: Literal["quantile", "conformal", "conformal_conditional"] = Field(
        "quantile",
        description="quantile: accepts target_tpr of ID validation; conformal: of new ID images, "
        "on average; conformal_conditional: of them, with the confidence",
    )
    confidence: float = Field(
        0.9, gt=0, lt=1, description="of conformal_conditional, over ID validation sets"
    )
    known: Known = Field(
        "validation",
        description="whose scores: ID validation's; full_spectrum: those of the sets "
        "validation_shifted/NAME too, image by image",
    )


class MarkedRow(Section):
    """A row of the tables that is marked: a method judged by a score."""

    method: str = Field(description="name of a method of the run")
    score: str = Field(description="name of a score of the run")
    label: str = Field(min_length=1, description="what the tables say of the row")


class CompareConfig(Section):
    """What is compared with what; a name that is not in the run compares nothing."""

    reference: str | None = Field(
        None, description="score whose difference to every other one gets a paired interval"
    )
    start: MarkedRow | None = Field(
        None, description="row {method, score, label} from which gains are counted"
    )
    end: MarkedRow | None = Field(
        None, description="row {method, score, label} that they lead to: training, score, both"
    )

    @model_validator(mode="after")
    def _both_rows(self) -> CompareConfig:
        if (self.start is None) != (self.end is None):
            raise ValueError("give both of start and end, or none of them")
        return self

    def label(self, method: str, score: str) -> str:
        """What the tables say of a row; empty for one that is not marked."""
        for row in (self.start, self.end):
            if row is not None and (row.method, row.score) == (method, score):
                return row.label
        return ""
