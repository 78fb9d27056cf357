"""The section `sweep.posthoc`: which settings of the scores are tried, without any training."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipelines.config import Section


class PostHocConfig(Section):
    """The same number of settings for every score that has a parameter."""

    budget: int = Field(24, ge=1, description="settings tried of each score")
    tau: tuple[float, float] = Field(
        (0.02, 5.0),
        description="temperatures on the scale of similarities, from - to, log-spaced; "
        "scores of logits get them times the logit scale",
    )
    c: list[int] = Field([1, 2, 3], min_length=1, description="values of DeltaEnergy's c")
    gamma: list[float] = Field([0.05, 0.1, 0.25, 0.5], min_length=1, description="of gen")
    weight: list[float] = Field(
        [0.5, 1.0, 2.0], min_length=1, description="of the local features in gl_mcm"
    )
    k: list[int] = Field([1, 5, 10, 20, 50, 100, 200], min_length=1, description="of knn")

    @model_validator(mode="after")
    def _ordered(self) -> PostHocConfig:
        if not 0 < self.tau[0] < self.tau[1]:
            raise ValueError(f"tau={list(self.tau)}: need 0 < from < to")
        if min(self.k) < 1:
            raise ValueError(f"k={self.k}: neighbours are counted from 1")
        return self
