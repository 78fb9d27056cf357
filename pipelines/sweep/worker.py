"""What a Ray Tune worker runs: trials whose records are files, and what it reports of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import ray.tune

from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.methods import MethodConfig
from pipelines.score import search as posthoc
from pipelines.sweep import trial as sweep_trial
from pipelines.sweep.result import NO_DETECTION, Detection, Settings
from pipelines.sweep.space import in_order
from pipelines.sweep.spec import MakeSpec, Spec
from pipelines.sweep.trial import Follow, OnEpoch, Shared
from pipelines.sweep.trial_record import (
    TrialRecord,
    failed,
    has_record,
    keep_record,
    read_record,
)

# What Ray Tune takes from a trial: figures by name.
Report: TypeAlias = dict[str, float | int | bool | str]

# What is reported of a setting that failed: the worst of everything.
_WORST = {"accuracy": 0.0, "auroc": 0.0, "fpr": 1.0}
# Beyond every epoch, so that a finished trial is not taken for one on its way.
_AFTER_THE_LAST = 10**9


class Trials(Protocol):
    """What trials of heads, or of networks, work on."""

    @property
    def storage(self) -> Storage:
        """Where records are kept."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of those that judge."""

    def trial(
        self, name: str, method: MethodConfig, on_epoch: OnEpoch | None = None
    ) -> TrialRecord:
        """Train and judge one setting of the method of that name."""

    def needs_worker(self, method: MethodConfig) -> bool:
        """Whether a trial is so much work that a worker is started for it."""


def run(spec: Spec, shared: Trials, on_epoch: OnEpoch | None = None) -> TrialRecord:
    """The record of one trial: found, or made and kept.

    Args:
        spec: what to train.
        shared: what it works on.
        on_epoch: called after each epoch with its number and what judges it.
    """
    if has_record(shared.storage, spec.address):
        return read_record(shared.storage, spec.address)
    if spec.problem is not None:
        record = failed(UserError(spec.problem))
    else:
        record = sweep_trial.attempt(lambda: shared.trial(spec.method, spec.config, on_epoch))
    keep_record(record, shared.storage, spec.address)
    return record


def run_together(specs: Sequence[Spec], shared: Shared) -> Iterator[tuple[Spec, TrialRecord]]:
    """The records of trials of one shape, those that are missing trained as one batched model."""
    missing = [spec for spec in specs if not has_record(shared.storage, spec.address)]
    for spec in specs:
        if spec not in missing:
            yield spec, read_record(shared.storage, spec.address)
    records = sweep_trial.trials_together([spec.config for spec in missing], shared)
    for spec, record in zip(missing, records, strict=True):
        keep_record(record, shared.storage, spec.address)
        yield spec, record


def known_trials(config: Mapping[str, Sequence[Spec]], shared: Trials) -> None:
    """Run settings that were known beforehand: a report for each that is finished."""
    specs = config["specs"]
    if len(specs) == 1:
        ray.tune.report(_summary(run(specs[0], shared), specs[0]))
        return
    assert isinstance(shared, Shared)  # networks have no shape to be trained together in
    for spec, record in run_together(specs, shared):
        ray.tune.report(_summary(record, spec))


def live_trial(config: Mapping[str, Settings], shared: Trials, make_spec: MakeSpec) -> None:
    """Run a setting that was proposed: a report an epoch, so that a scheduler can stop it."""
    spec = make_spec(in_order(config["values"]))
    score = _followed_score(spec.criterion, shared.scores)

    def on_epoch(epoch: int, follow: Follow) -> None:
        if epoch < spec.config.num_epochs:
            accuracy, seen = follow(score)
            ray.tune.report({"epoch": epoch, "finished": False, **_figures(accuracy, seen)})

    ray.tune.report(_summary(run(spec, shared, on_epoch), spec))


def _followed_score(criterion: str, scores: Sequence[str]) -> str:
    """The score that is followed over epochs: the criterion, if similarities alone give it."""
    plain = [score for score in scores if score in posthoc.USABLE]
    return criterion if criterion in plain or not plain else plain[0]


def _summary(record: TrialRecord, spec: Spec) -> Report:
    """The figures of a finished trial for the terminal, schedulers and Optuna."""
    finished: Report = {"finished": True, "method": spec.method, "epoch": _AFTER_THE_LAST}
    if record.accuracy is None:
        return {**finished, **_WORST, "failed": True}
    seen = record.by(spec.criterion) or NO_DETECTION
    return {**finished, **_figures(record.accuracy, seen), "failed": False}


def _figures(accuracy: float, seen: Detection) -> dict[str, float]:
    return {"accuracy": accuracy, "auroc": seen.auroc, "fpr": seen.fpr}
