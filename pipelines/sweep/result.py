"""What a sweep writes: every trial, and the setting that it chose of each method."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from pydantic import Field, JsonValue

from pipelines.methods import AnyMethod
from pipelines.records import Record, StoredRecord

# What stands for the unknown while settings are chosen; none: nothing is searched.
JudgedOn: TypeAlias = Literal["validation_ood", "outliers", "held_out_classes", "none"]
# The value of a method's dotted key: a number, a word, a list of templates, null.
SettingValue: TypeAlias = JsonValue
Settings: TypeAlias = dict[str, SettingValue]
# Counts stay whole numbers: DeltaEnergy's c, knn's k.
ScoreParams: TypeAlias = dict[str, int | float]
# A stopped trial has the figures of its last epoch, a failed one has none.
Status: TypeAlias = Literal["done", "stopped", "failed"]


class ScoreFigures(Record):
    """The best setting of a score on validation data: AUROC and FPR in [0, 1], settings tried."""

    params: ScoreParams
    auroc: float
    fpr: float
    tried: int


class Detection(NamedTuple):
    """How well unknown images are told from known ones, in [0, 1]."""

    auroc: float
    fpr: float


# Of a head that none of the run's scores applies to: the least AUROC, so it is chosen last.
NO_DETECTION = Detection(0.0, 0.0)


def detection(scores: dict[str, ScoreFigures], criterion: str) -> Detection | None:
    """A trial's figures under one score, or their mean over all where that one was not judged.

    Args:
        scores: the best setting of every score that was judged.
        criterion: the method's selection criterion, a score's name.
    """
    chosen = [scores[criterion]] if criterion in scores else list(scores.values())
    if not chosen:
        return None
    auroc = sum(figures.auroc for figures in chosen) / len(chosen)
    fpr = sum(figures.fpr for figures in chosen) / len(chosen)
    return Detection(auroc, fpr)


class Trial(Record):
    """One training of a sweep and what validation data said of it.

    Attributes:
        method: its name in tables.
        trial: its number among the method's.
        settings: the values that were tried, by dotted key.
        status: how it ended.
        reason: why it was stopped or failed.
        accuracy: on ID validation.
        seconds: that it took.
        scores: by score, its best setting.
    """

    method: str
    trial: int
    settings: Settings
    status: Status
    reason: str | None = None
    accuracy: float | None = None
    seconds: float = 0.0
    scores: dict[str, ScoreFigures] = Field(default_factory=dict)

    def by(self, criterion: str) -> Detection | None:
        """The trial's AUROC and FPR under a selection criterion; None where it has no figures."""
        return detection(self.scores, criterion)


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
    chosen: Settings = Field(default_factory=dict)
    trial: int | None = None
    scores: dict[str, ScoreParams]
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

    def of(self, method: str) -> list[Trial]:
        """The trials of one method."""
        return [trial for trial in self.trials if trial.method == method]
