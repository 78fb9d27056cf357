"""Training jobs of a run with their names: progress for the terminal, epochs for MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipelines.data.storage import Storage
from pipelines.finetune.cache import read_record
from pipelines.finetune.data import EpochReport, TrainingJob
from pipelines.finetune.epoch_log import EpochLog
from pipelines.records import HeadKey
from pipelines.store.tracker import Tracker

Progress = Callable[[int, int, str], None]
# Trains jobs and gives the addresses of their heads; tells each epoch's report.
Train = Callable[[Sequence[TrainingJob], Callable[[TrainingJob, EpochReport], None]], list[str]]


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
    total = sum(j.method.training.epochs for j in jobs.values() if j.method.head.trainable)
    reported: set[tuple[str, float]] = set()
    log = EpochLog(lambda name: tracker.run(name, parent=parent))

    def on_epoch(job: TrainingJob, report: EpochReport) -> None:
        # Methods with the same setting share a job; it is shown under the first one's name.
        name = next(_name(key) for key, known in jobs.items() if known == job)
        reported.add((name, report["epoch"]))
        on_progress(len(reported), total, f"epochs, {name}")
        log.add(name, report)

    addresses = dict(zip(jobs, train(list(jobs.values()), on_epoch), strict=True))
    for key, address in addresses.items():
        with tracker.run(_name(key), parent=parent) as active:
            active.log_params({"method": key.method, "seed": key.seed, "address": address})
        log.finish(_name(key), read_record(storage, address).history)
    return addresses


def _name(key: HeadKey) -> str:
    """The name of a training, in MLflow and on the terminal."""
    return f"finetune {key}"
