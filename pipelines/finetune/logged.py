"""Training jobs of a run with their names: progress for the terminal, epochs for MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from pipelines.data.storage import Storage
from pipelines.finetune.cache import read_record
from pipelines.finetune.data import EpochReport, TrainingJob
from pipelines.finetune.epoch_log import EpochLog
from pipelines.methods import MethodConfig
from pipelines.records import HeadKey
from pipelines.store.tracker import Tracker

Progress = Callable[[int, int, str], None]
# Trains jobs and gives the addresses of their heads; tells each epoch's report.
Train = Callable[[Sequence[TrainingJob], Callable[[TrainingJob, EpochReport], None]], list[str]]


class Job(Protocol):
    """A training of a head or of a network."""

    @property
    def method(self) -> MethodConfig:
        """Every value of the method."""


JobT = TypeVar("JobT", bound=Job)


def train_logged(
    jobs: Mapping[HeadKey, TrainingJob],
    train: Train,
    storage: Storage,
    *,
    tracker: Tracker,
    parent: str,
    on_progress: Progress,
) -> dict[HeadKey, str]:
    """The address of each job's head; every training is an MLflow run below `parent`.

    Args:
        jobs: what is trained.
        train: trains them, `pipelines.finetune.stage.train` with what it works on.
        storage: where the heads are kept.
        tracker: the MLflow store.
        parent: the MLflow run of the whole.
        on_progress: called with (epochs done, in all, a note).
    """
    return log_trainings(
        "finetune",
        jobs,
        lambda on_epoch: train(list(jobs.values()), on_epoch),
        lambda address: read_record(storage, address).history,
        tracker=tracker,
        parent=parent,
        on_progress=on_progress,
    )


def log_trainings(
    stage: str,
    jobs: Mapping[HeadKey, JobT],
    train: Callable[[Callable[[JobT, EpochReport], None]], list[str]],
    history: Callable[[str], Sequence[EpochReport]],
    *,
    tracker: Tracker,
    parent: str,
    on_progress: Progress,
) -> dict[HeadKey, str]:
    """The address of each job's result; every training is an MLflow run below `parent`.

    Args:
        stage: that trains, for names.
        jobs: what is trained.
        train: trains them in order, and tells each epoch's report.
        history: the reports of a finished training, by its address.
        tracker: the MLflow store.
        parent: the MLflow run of the whole.
        on_progress: called with (epochs done, in all, a note).
    """
    total = sum(job.method.num_epochs for job in jobs.values() if _trains(job.method))
    reported: set[tuple[str, float]] = set()
    log = EpochLog(lambda name: tracker.run(name, parent=parent))

    def on_epoch(job: JobT, report: EpochReport) -> None:
        # Methods with the same setting share a job; it is shown under the first one's name.
        name = next(f"{stage} {key}" for key, known in jobs.items() if known == job)
        reported.add((name, report["epoch"]))
        on_progress(len(reported), total, f"epochs, {name}")
        log.add(name, report)

    addresses = dict(zip(jobs, train(on_epoch), strict=True))
    for key, address in addresses.items():
        with tracker.run(f"{stage} {key}", parent=parent) as active:
            active.log_params({"method": key.method, "seed": key.seed, "address": address})
        log.finish(f"{stage} {key}", history(address))
    return addresses


def _trains(method: MethodConfig) -> bool:
    return method.head.trainable or method.network is not None
