"""The section `sweep`: what is searched, how settings are proposed and stopped, equal budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from pipelines.config import Section
from pipelines.score.config import PostHocConfig
from pipelines.sweep.domains import Sampler, problem, size

if TYPE_CHECKING:
    from pipelines.methods import MethodConfig

Objective: TypeAlias = Literal["auroc", "accuracy", "fpr"]
Scheduler: TypeAlias = Literal["none", "asha", "median"]


class SweepConfig(Section):
    """What is searched; an empty `space` searches the scores' parameters only."""

    posthoc: PostHocConfig = PostHocConfig()
    space: dict[str, dict[str, Any]] = Field(
        {},
        description="by method: dotted keys, each with a list of values or {sampler: [...]}",
    )
    lr_factors: list[float] = Field(
        [],
        description="for a trained method that `space` does not name: its own learning rate times "
        "each of these; none: its own settings only",
    )
    sampler: Sampler = Field(
        "grid", description="grid: every combination of lists; random; optuna: TPE"
    )
    num_samples: int | None = Field(
        None, ge=1, description="trainings of each method; needed by random and optuna"
    )
    scheduler: Scheduler = Field(
        "none", description="stops weak trials early, by their figures after each epoch"
    )
    grace_epochs: int = Field(5, ge=1, description="epochs before a trial may be stopped")
    objectives: list[Objective] = Field(
        ["auroc"],
        min_length=1,
        description="what optuna looks at, several at once too; schedulers compare by the first",
    )
    time_budget_s: float | None = Field(
        None, gt=0, description="seconds after which no trial goes on"
    )
    seed: int = Field(0, ge=0, description="of random draws and of optuna")
    accuracy_tolerance: float = Field(
        0.01, ge=0, le=1, description="ID validation accuracy that a better AUROC may cost"
    )
    enabled: bool = Field(True, description="false: the defaults of every method and score")

    @model_validator(mode="after")
    def _spaces(self) -> SweepConfig:
        for method, domains in self.space.items():
            for key, domain in domains.items():
                if wrong := problem(domain):
                    raise ValueError(f"space.{method}.{key}: {wrong}")
                if self.sampler == "grid" and not isinstance(domain, list):
                    raise ValueError(
                        f"space.{method}.{key}: a grid needs a list of values; give one, or "
                        "sampler=random (or optuna) and num_samples"
                    )
        if self.sampler != "grid" and self.num_samples is None:
            raise ValueError(f"sampler={self.sampler}: give num_samples, the trainings a method")
        return self

    @model_validator(mode="after")
    def _equal_budgets(self) -> SweepConfig:
        if self.num_samples is not None:
            return self
        sizes = {m: size(s) for m, s in self.space.items() if s}
        if self.lr_factors:
            sizes["lr_factors"] = len(self.lr_factors)
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{method}: {n}" for method, n in sizes.items())
            raise ValueError(f"space: every method gets the same number of trials, came {listed}")
        return self

    def completed(self, methods: Mapping[str, MethodConfig]) -> SweepConfig:
        """The same sweep with a space for each trained method, where `lr_factors` gives one."""
        trained = {n: m for n, m in methods.items() if self.lr_factors and m.head.trainable}
        around = {
            name: {"training.lr": [factor * method.training.lr for factor in self.lr_factors]}
            for name, method in trained.items()
        }
        return self.model_copy(update={"space": {**around, **self.space}})
