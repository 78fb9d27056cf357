"""The record of a finished trial, kept under `cache/trials/ADDRESS.json`.

A setting that fails (a loss that is no number, a value that the method refuses) has a record too,
with the reason, so that it is not tried again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from pipelines.config import UserError
from pipelines.data import kept
from pipelines.data.storage import Storage
from pipelines.records import Record, StoredRecord
from pipelines.score.search import Setting
from pipelines.sweep.result import Detection, ScoreFigures, Status, detection

TRIALS = ("cache", "trials")


class Surface(Record):
    """Every post-hoc setting of a score under one head, as columns with one entry a setting.

    Attributes:
        params: the values of each parameter, by name.
        auroc, fpr: on validation data, in [0, 1].
    """

    params: dict[str, tuple[int | float, ...]]
    auroc: tuple[float, ...]
    fpr: tuple[float, ...]

    @classmethod
    def of(cls, settings: Sequence[Setting]) -> Surface:
        """The columns of a score's settings, which share their parameters' names."""
        return cls(
            params={name: tuple(s.params[name] for s in settings) for name in settings[0].params},
            auroc=tuple(setting.auroc for setting in settings),
            fpr=tuple(setting.fpr for setting in settings),
        )


class TrialRecord(StoredRecord):
    """What one training and the search over every score's parameters gave.

    Attributes:
        status: how the trial ended.
        reason: why it was stopped or failed.
        accuracy: on ID validation.
        scores: by score, its best setting.
        surface: by score with more than one setting, all of them.
        best_epoch: the epoch whose head was judged.
        seconds: that it took.
    """

    status: Status
    reason: str | None = None
    accuracy: float | None = None
    scores: dict[str, ScoreFigures] = Field(default_factory=dict)
    surface: dict[str, Surface] = Field(default_factory=dict)
    best_epoch: int = 0
    seconds: float = 0.0

    def by(self, criterion: str) -> Detection | None:
        """The trial's AUROC and FPR under a selection criterion; None where it has no figures."""
        return detection(self.scores, criterion)


def failed(error: Exception, seconds: float = 0.0) -> TrialRecord:
    """The record of a setting that cannot be trained or judged."""
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return TrialRecord(status="failed", reason=f"{name}{error}", seconds=round(seconds, 3))


def has_record(storage: Storage, address: str) -> bool:
    """Whether the trial at that address is finished; a damaged record is removed."""
    return kept.find_record(storage, TrialRecord, *_place(address)) is not None


def read_record(storage: Storage, address: str) -> TrialRecord:
    """The record of a finished trial.

    Raises:
        Damaged: where it is not as it was written.
    """
    return kept.read_record(storage, TrialRecord, *_place(address))


def keep_record(record: TrialRecord, storage: Storage, address: str) -> None:
    """Write the record of a trial."""
    kept.write_record(storage, record, *_place(address))


def _place(address: str) -> tuple[str, ...]:
    return (*TRIALS, f"{address}.json")
