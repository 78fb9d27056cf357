"""Training features in, fitted scores out: closed forms here, energy models with Ray Train.

A `ScoreFit` (`pipelines.fitted.plan`) names one record, kept at the address of what decides it:

    cache/fitted/ADDRESS/record.safetensors   the fitted record
    cache/fitted/ADDRESS/checkpoint.pt        state of a training after its last finished epoch
    cache/fitted/ADDRESS/failed.json          why a training came to no record
    cache/fitted/ADDRESS/manifest.json        written last: what went in; a training's history
    cache/statistics/ADDRESS/                 class means and scatter of the training features

The statistics are one Ray Data reduction over the feature shards. Energy models are trained on
all Ray Train workers, each with its rows of every batch; W workers equal one to rounding.
"""

from __future__ import annotations

import functools
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import safetensors.numpy
import torch

from pipelines.compute.cluster import ComputeConfig
from pipelines.compute.ray_train import forwarding, run_on_workers, sender, wait_for_all
from pipelines.config import UserError, digest
from pipelines.data import kept
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.kept import Entry
from pipelines.data.storage import Storage
from pipelines.finetune.cache import load_predictor
from pipelines.fitted import class_statistics, record
from pipelines.fitted.address import address as address_of
from pipelines.fitted.address import part_addresses
from pipelines.fitted.plan import FitData, ScoreFit, plan
from pipelines.heads import Predictor
from pipelines.heads.base import LOCAL
from pipelines.heads.parallel import Workers
from pipelines.methods import MethodConfig
from pipelines.ood.energy_training import EpochReport, TrainerState
from pipelines.ood.statistics import ClassStatistics
from pipelines.records import Params, StoredRecord
from pipelines.score import by_name as scoring
from pipelines.score.by_name import TRAINED, Fitted, Records
from pipelines.score.cache import (
    FOLDER,
    FittedManifest,
    is_fitted,
    load_record,
    load_records,
    write,
)

if TYPE_CHECKING:  # Ray takes seconds to import: only where workers are started
    import ray
    from ray.util.queue import Queue

STATISTICS = "statistics.safetensors"

Mode: TypeAlias = Literal["ray", "in_process"]
OnEpoch: TypeAlias = Callable[[ScoreFit, EpochReport], None]
Progress: TypeAlias = Callable[[int, int, str], None]


class StatisticsManifest(StoredRecord):
    """What says that class statistics are complete; `features`: the address of their set."""

    features: str


class Failure(StoredRecord):
    """The content of `failed.json`: why a training came to no record."""

    error: str


def statistics_entry(storage: Storage, address: str) -> Entry[StatisticsManifest]:
    """The folder of the statistics of features at that address."""
    place = digest([address, class_statistics.statistics_code().digest])
    return Entry(storage, ("cache", "statistics", place), StatisticsManifest)


def load_data(sets: FeatureSets, storage: Storage, *, mode: Mode, local: bool = False) -> FitData:
    """The training features and their statistics; needs Ray in mode "ray" the first time.

    With `local` the local features too, for heads that take them.
    """
    view = sets.for_training()
    train = view.load("train")
    address = sets.address(["train"])
    entry = statistics_entry(storage, address)
    if entry.find() is None:
        reduced = class_statistics.reduce_shards(view, "train", with_ray=mode == "ray")
        names = ("counts", "means", "scatter")
        content = {name: np.ascontiguousarray(getattr(reduced, name)) for name in names}
        about = StatisticsManifest(features=address)
        entry.write(about, {STATISTICS: safetensors.numpy.save(content)})
    arrays = safetensors.numpy.load(entry.read_all([STATISTICS])[1][STATISTICS])
    return FitData(
        train.features,
        train.labels,
        ClassStatistics(**arrays, normalized=True),
        address,
        view.column("train", LOCAL) if local else None,
    )


def run(
    fits: Sequence[ScoreFit],
    data: FitData,
    storage: Storage,
    *,
    compute: ComputeConfig,
    mode: Mode = "ray",
    on_progress: Progress | None = None,
) -> list[str]:
    """Fit what the cache does not hold; parts of sums come before the sums.

    Args:
        fits: what to fit.
        data: what to fit to.
        storage: where records, checkpoints and heads are kept.
        compute: number of Ray Train workers and their resources.
        mode: "ray" needs an initialised Ray when a model is to be trained; "in_process" never
            does and gives the same bytes as Ray Train with one worker.
        on_progress: called on the driver with (epochs done, in all, a note).

    Returns:
        The address of each record, in order.

    Raises:
        UserError: where the features cannot be fitted, or a training diverged.
    """
    addresses = [address_of(fit, data) for fit in fits]
    missing = {a: f for a, f in zip(addresses, fits, strict=True) if not is_fitted(storage, a)}
    trainings = [fit for fit in missing.values() if fit.score in TRAINED]
    on_epoch = _counting(trainings, on_progress)
    for fit in trainings:  # a damaged checkpoint is told of here: a worker is not heard
        kept.find_file(storage, *_checkpoint_place(address_of(fit, data)))
    if trainings and mode == "ray":
        _train_with_ray(trainings, data, storage, compute, on_epoch)
        _raise_failures(trainings, data, storage)
    for address, fit in missing.items():
        if not is_fitted(storage, address):
            _fit_and_keep(fit, data, storage, record.Place(on_epoch=_of(fit, on_epoch)))
    return addresses


def _counting(trainings: Sequence[ScoreFit], on_progress: Progress | None) -> OnEpoch | None:
    """What turns epochs into progress; an epoch that comes again after a restart counts once."""
    if on_progress is None:
        return None
    total = sum(record.settings(training).epochs for training in trainings)
    seen: set[tuple[int, float]] = set()

    def on_epoch(training: ScoreFit, report: EpochReport) -> None:
        seen.add((id(training), report["epoch"]))
        on_progress(len(seen), total, f"epochs, {training.score} seed {training.seed}")

    return on_epoch


@dataclass(frozen=True)
class HeadToFit:
    """A stored head and the scores that are to judge by it.

    Attributes:
        method: that trained it, as chosen.
        seed: of the head.
        address: of the head.
        scores: parameters by name.
    """

    method: MethodConfig
    seed: int
    address: str
    scores: Mapping[str, Params]


def run_for_heads(
    heads: Sequence[HeadToFit],
    methods: Mapping[str, MethodConfig],
    data: FitData,
    storage: Storage,
    *,
    compute: ComputeConfig,
    mode: Mode = "ray",
    on_progress: Progress | None = None,
) -> list[dict[str, tuple[ScoreFit, str]]]:
    """Fit what the scores of trained heads need, each record once.

    Args:
        heads: with scores that apply to them.
        methods: of the run.
        data: what to fit to.
        storage: where heads and records are kept.
        compute: as `run`.
        mode: as `run`.
        on_progress: as `run`.

    Returns:
        For each head: by record name, the `ScoreFit` and its address.
    """
    plans = [
        plan(h.scores, method=h.method, methods=methods, seed=h.seed, head=h.address) for h in heads
    ]
    fits = [fit for planned in plans for fit in planned.values()]
    # Sums read their parts' records: those first.
    fits.sort(key=lambda fit: scoring.is_sum(fit.score))
    run(fits, data, storage, compute=compute, mode=mode, on_progress=on_progress)
    return [{n: (fit, address_of(fit, data)) for n, fit in planned.items()} for planned in plans]


def fit_here(
    fits: Mapping[str, ScoreFit], data: FitData, storage: Storage, predictor: Predictor
) -> Records:
    """The records of a plan for a head that is not stored (a sweep's trial), in this process.

    Only energy models are looked for in the cache and kept there: the others take no time.

    Raises:
        UserError: as `run`.
    """
    records: dict[str, Fitted] = {}
    for name, fit in fits.items():
        if fit.score in TRAINED:
            (address,) = run([fit], data, storage, compute=ComputeConfig(), mode="in_process")
            records[name] = load_record(storage, name, address)
            continue
        try:
            records[name] = record.without_training(fit, data, predictor, records)
        except ValueError as error:
            raise UserError(f"score {fit.score}: {error}") from None
    return records


def _fit_and_keep(fit: ScoreFit, data: FitData, storage: Storage, place: record.Place) -> None:
    address, start = address_of(fit, data), time.perf_counter()
    about = FittedManifest(score=fit.score, params=dict(fit.params), seed=fit.seed)
    try:
        if fit.score in TRAINED:
            trainer = record.train(fit, data, _checkpoint(storage, address), place)
            made: Fitted = trainer.model()
            # As it is read back: lists for tuples.
            settings = json.loads(json.dumps(asdict(trainer.settings)))
            trained = {"settings": settings, "history": tuple(trainer.history)}
            about = about.model_copy(update=trained)
        else:
            predictor = None if fit.head is None else load_predictor(storage, fit.head)
            parts = load_records(storage, part_addresses(fit, data))
            made = record.without_training(fit, data, predictor, parts)
    except ValueError as error:
        raise UserError(f"score {fit.score}: {error}") from None
    if place.workers.rank == 0:
        seconds = round(time.perf_counter() - start, 3)
        write(storage, address, made, about.model_copy(update={"seconds": seconds}))


def _checkpoint_place(address: str) -> tuple[str, ...]:
    return (*FOLDER, address, "checkpoint.pt")


def _checkpoint(storage: Storage, address: str) -> record.Checkpoint:
    """The state of a training beside its record."""
    place = _checkpoint_place(address)

    def load() -> TrainerState | None:
        content = kept.find_file(storage, *place)
        if content is None:
            return None
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return TrainerState(**state)

    def save(state: TrainerState) -> None:
        file = io.BytesIO()
        torch.save(vars(state), file)  # plain data, which `weights_only` reads
        kept.write_file(storage, file.getvalue(), *place)

    return record.Checkpoint(load, save)


def _train_with_ray(
    fits: Sequence[ScoreFit],
    data: FitData,
    storage: Storage,
    compute: ComputeConfig,
    on_epoch: OnEpoch | None,
) -> None:
    import ray

    report = None if on_epoch is None else lambda n, figures: on_epoch(fits[n], figures)
    with forwarding(report) as reports:
        run_on_workers(_worker, _Sent(fits, ray.put(data), storage, reports), storage, compute)


def _raise_failures(fits: Sequence[ScoreFit], data: FitData, storage: Storage) -> None:
    """What workers wrote down in place of a record, as one line for the user."""
    for fit in fits:
        if is_fitted(storage, address_of(fit, data)):
            continue
        place = (*FOLDER, address_of(fit, data), "failed.json")
        if (failure := kept.find_record(storage, Failure, *place)) is not None:
            raise UserError(failure.error)


@dataclass(frozen=True, eq=False)
class _Sent:
    """What every worker is given: the trainings, their data in Ray's object store, whom to tell."""

    fits: Sequence[ScoreFit]
    data: ray.ObjectRef[FitData]
    storage: Storage
    reports: Queue | None


def _worker(sent: _Sent) -> None:
    """What every Ray Train worker runs: the trainings, one after the other."""
    import ray.train.torch

    place = ray.train.get_context()
    workers = Workers(place.get_world_rank(), place.get_world_size())
    data, storage = ray.get(sent.data), sent.storage
    for number, fit in enumerate(sent.fits):
        if not is_fitted(storage, address_of(fit, data)):
            send = sender(sent.reports if workers.rank == 0 else None, number)
            where = record.Place(workers, str(ray.train.torch.get_device()), send)
            try:
                _fit_and_keep(fit, data, storage, where)
            except UserError as error:
                # A restart would end the same way: the driver tells the user instead.
                if workers.rank == 0:
                    failed = (*FOLDER, address_of(fit, data), "failed.json")
                    kept.write_record(storage, Failure(error=str(error)), *failed)
        wait_for_all(workers.world)


def _of(fit: ScoreFit, on_epoch: OnEpoch | None) -> Callable[[EpochReport], None] | None:
    """What is told of the epochs of one training."""
    return None if on_epoch is None else functools.partial(on_epoch, fit)
