"""What a sweep writes: every trial, and the setting that it chose of each method."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field

from pipelines.methods import AnyMethod
from pipelines.records import Record, StoredRecord

# What a setting of a score is judged on; none: nothing was searched.
JudgedOn: TypeAlias = Literal["validation_ood", "outliers", "held_out_classes", "none"]
# The value of a method's dotted key: a number, a word, a list of templates, null.
SettingValue: TypeAlias = Any


class ScoreFigures(Record):
    """The best setting of a score on validation data: AUROC and FPR in [0, 1], settings tried."""

    params: dict[str, float]
    auroc: float
    fpr: float
    tried: int


class Trial(Record):
    """One training of a sweep and what validation data said of it.

    Attributes:
        method: its name in tables; trial: its number among the method's.
        settings: the values that were tried, by dotted key.
        status: a stopped trial has the figures of its last epoch, a failed one has none.
        reason: why it was stopped or failed.
        accuracy: on ID validation.
        seconds: that it took.
        scores: by score, its best setting.
    """

    method: str
    trial: int
    settings: dict[str, SettingValue]
    status: Literal["done", "stopped", "failed"]
    reason: str | None = None
    accuracy: float | None = None
    seconds: float = 0.0
    scores: dict[str, ScoreFigures] = Field(default_factory=dict)


class Choice(Record):
    """The setting that validation chose of one method.

    Attributes:
        setting: every value of the method.
        chosen: the searched values among them, by dotted key.
        trial: its number; None where nothing was searched.
        scores: the parameters of every score under it.
        validation: the figures of every score that validation could judge.
        accuracy: on ID validation; None where nothing was searched.
    """

    setting: AnyMethod
    chosen: dict[str, SettingValue] = Field(default_factory=dict)
    trial: int | None = None
    scores: dict[str, dict[str, float]]
    validation: dict[str, ScoreFigures] = Field(default_factory=dict)
    accuracy: float | None = None


class SweepResult(StoredRecord):
    """The content of `sweep.json`.

    Attributes:
        criterion: the rule of choice, in words.
        judged_on: what stood for the unknown.
        sampler, scheduler: how settings were proposed and stopped.
        accuracy_tolerance: ID validation accuracy that a better AUROC may cost.
        budget: post-hoc settings of each score.
        methods: the choice of each method, in the order of the run.
        trials: all of them.
    """

    criterion: str
    judged_on: JudgedOn = "none"
    sampler: str = "grid"
    scheduler: str = "none"
    accuracy_tolerance: float = 0.0
    budget: int = Field(0, ge=0)
    methods: dict[str, Choice]
    trials: tuple[Trial, ...] = ()
