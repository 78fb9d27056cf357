"""Training features in, fitted scores out: closed forms here, energy models with Ray Train.

A `Fit` (`pipelines.fitted.plan`) names one record, which is found again by content, like a head:

    cache/scores/ADDRESS/record.safetensors   the fitted record
    cache/scores/ADDRESS/checkpoint.pt        state of a training after its last finished epoch
    cache/scores/ADDRESS/failed.json          why a training came to no record
    cache/scores/ADDRESS/manifest.json        written last: what went in; a training's history
    cache/statistics/ADDRESS.safetensors      class means and scatter of the training features

The statistics are one Ray Data reduction over the feature shards. Energy models are trained on
all Ray Train workers, each with its rows of every batch; W workers equal one to rounding.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import safetensors.numpy
import torch

from pipelines.backbones.threads import torch_threads
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError, digest
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.finetune.cache import load_predictor
from pipelines.finetune.stage import forwarding, run_on_workers, sender, wait_for_all
from pipelines.fitted import class_statistics
from pipelines.fitted.plan import Fit, FitData, code_version, linear_rule, plan
from pipelines.heads import Predictor
from pipelines.heads.base import LOCAL
from pipelines.heads.parallel import Workers
from pipelines.methods import MethodConfig
from pipelines.methods.energy_models import EnergyModelConfig, density_fields
from pipelines.ood import FITTED_SCORES, GaussianMixture
from pipelines.ood.energy_training import EnergyTrainer, EpochReport
from pipelines.ood.statistics import ClassStatistics
from pipelines.score import by_name as scoring
from pipelines.score.by_name import JOIN, TRAINED, Combination, Params, Records
from pipelines.score.cache import FOLDER, is_fitted, load_record, load_records

Mode: TypeAlias = Literal["ray", "in_process"]
OnEpoch: TypeAlias = Callable[[Fit, EpochReport], None]
Progress: TypeAlias = Callable[[int, int, str], None]


def load_data(sets: FeatureSets, storage: Storage, *, mode: Mode, local: bool = False) -> FitData:
    """The training features and their statistics; needs Ray in mode "ray" the first time.

    With `local` also the features of the patches, for heads that take them.
    """
    view = sets.for_training()
    train = view.load("train")
    address = sets.address(["train"])
    place = ("cache", "statistics", f"{digest([address, code_version()])}.safetensors")
    if not storage.exists(*place):
        reduced = class_statistics.reduce_shards(view, "train", with_ray=mode == "ray")
        names = ("counts", "means", "scatter")
        content = {name: np.ascontiguousarray(getattr(reduced, name)) for name in names}
        storage.write_bytes(safetensors.numpy.save(content), *place)
    arrays = safetensors.numpy.load(storage.read_bytes(*place))
    return FitData(
        train.features,
        train.labels,
        ClassStatistics(**arrays, normalized=True),
        address,
        view.column("train", LOCAL) if local else None,
    )


def run(
    fits: Sequence[Fit],
    data: FitData,
    storage: Storage,
    *,
    compute: ComputeConfig,
    mode: Mode = "ray",
    on_progress: Progress | None = None,
) -> list[str]:
    """Fit what the cache does not hold; parts of sums stand before the sums.

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
    addresses = [fit.address(data) for fit in fits]
    missing = {a: f for a, f in zip(addresses, fits, strict=True) if not is_fitted(storage, a)}
    trainings = [fit for fit in missing.values() if fit.score in TRAINED]
    on_epoch = _counting(trainings, on_progress)
    if trainings and mode == "ray":
        _train_with_ray(trainings, data, storage, compute, on_epoch)
        _raise_failures(trainings, data, storage)
    for address, fit in missing.items():
        if not is_fitted(storage, address):
            _fit_and_keep(fit, data, storage, Workers(), on_epoch)
    return addresses


def _counting(trainings: Sequence[Fit], on_progress: Progress | None) -> OnEpoch | None:
    """What turns epochs into progress; an epoch that comes again after a restart counts once."""
    if on_progress is None:
        return None
    total = sum(_config(training).epochs for training in trainings)
    seen: set[tuple[int, float]] = set()

    def on_epoch(training: Fit, report: EpochReport) -> None:
        seen.add((id(training), report["epoch"]))
        on_progress(len(seen), total, f"epochs, {training.score} seed {training.seed}")

    return on_epoch


def _config(training: Fit) -> EnergyModelConfig:
    assert isinstance(training.density, EnergyModelConfig)
    return training.density


@dataclass(frozen=True)
class HeadFits:
    """A stored head and what its scores need.

    Attributes:
        method: the head's own, as chosen.
        seed: of the head.
        address: of the head.
        scores: parameters by name.
    """

    method: MethodConfig
    seed: int
    address: str
    scores: Mapping[str, Params]


def run_for_heads(
    heads: Sequence[HeadFits],
    methods: Mapping[str, MethodConfig],
    data: FitData,
    storage: Storage,
    *,
    compute: ComputeConfig,
    mode: Mode = "ray",
    on_progress: Progress | None = None,
) -> list[dict[str, tuple[Fit, str]]]:
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
        For each head: by record name, the `Fit` and its address.
    """
    plans = [
        plan(h.scores, method=h.method, methods=methods, seed=h.seed, head=h.address, data=data)
        for h in heads
    ]
    fits = [fit for planned in plans for fit in planned.values()]
    # Sums read their parts' records: those first.
    fits.sort(key=lambda fit: JOIN in fit.score)
    run(fits, data, storage, compute=compute, mode=mode, on_progress=on_progress)
    return [{n: (fit, fit.address(data)) for n, fit in planned.items()} for planned in plans]


def fit_here(
    fits: Mapping[str, Fit], data: FitData, storage: Storage, predictor: Predictor
) -> Records:
    """The records of a plan for a head that is not stored (a sweep's trial), in this process.

    Only energy models are looked for in the cache and kept there: the others take no time.

    Raises:
        UserError: as `run`.
    """
    records: dict[str, Any] = {}
    for name, fit in fits.items():
        if fit.score in TRAINED:
            (address,) = run([fit], data, storage, compute=ComputeConfig(), mode="in_process")
            records[name] = load_record(storage, name, address)
            continue
        try:
            records[name] = _closed_form(fit, data, predictor, records)
        except ValueError as error:
            raise UserError(f"score {fit.score}: {error}") from None
    return records


def _fit_and_keep(
    fit: Fit,
    data: FitData,
    storage: Storage,
    workers: Workers,
    on_epoch: OnEpoch | None,
    device: str = "cpu",
) -> None:
    address, start = fit.address(data), time.perf_counter()
    about: dict[str, Any] = {"score": fit.score, "params": dict(fit.params), "seed": fit.seed}
    try:
        if fit.score in TRAINED:
            report = None if on_epoch is None else functools.partial(on_epoch, fit)
            trainer = _train(fit, data, storage, workers, report, device)
            record: Any = trainer.model()
            about["settings"] = asdict(trainer.settings)
            about["history"] = trainer.history
        else:
            predictor = None if fit.head is None else load_predictor(storage, fit.head)
            record = _closed_form(fit, data, predictor, load_records(storage, dict(fit.records)))
    except ValueError as error:
        raise UserError(f"score {fit.score}: {error}") from None
    if workers.rank == 0:
        storage.write_bytes(scoring.to_bytes(record), *FOLDER, address, "record.safetensors")
        about["seconds"] = round(time.perf_counter() - start, 3)
        storage.write_json(about, *FOLDER, address, "manifest.json")


def _closed_form(fit: Fit, data: FitData, predictor: Predictor | None, records: Records) -> Any:
    """A record without a training; `predictor` and `records` where it reads them."""
    if fit.score == "gaussian_mixture":
        assert fit.density is not None
        return GaussianMixture.from_statistics(data.statistics, **density_fields(fit.density))
    arrays: dict[str, Any] = {"features": data.features, "labels": data.labels}
    if fit.head is not None:
        assert predictor is not None
        inputs = scoring.inputs_of(predictor, data.features, data.local)
        if JOIN in fit.score:
            return _combination(fit, inputs, records)
        arrays["weight"], arrays["bias"] = linear_rule(predictor) or (None, None)
        arrays["logits"] = inputs.logits
    params = {k: int(v) if k == "k" else v for k, v in fit.params.items()}
    return FITTED_SCORES[fit.score].fit(arrays, **params)


def _combination(fit: Fit, inputs: scoring.Inputs, records: Records) -> Combination:
    """Mean and deviation of each part over the whole training set.

    A training feature is its own nearest neighbour, at distance 0; there KNN counts the others.
    """
    if "knn" in records:
        known = records["knn"]
        others = replace(known, k=min(known.k + 1, len(known.features)))
        records = {**records, "knn": others}
    columns = [
        scoring.score_rows(part, inputs, scoring.part_params(fit.score, part, fit.params), records)
        for part in scoring.parts(fit.score)
    ]
    return Combination.fit(torch.stack(columns, dim=1))


def _train(
    fit: Fit,
    data: FitData,
    storage: Storage,
    workers: Workers,
    on_epoch: Callable[[EpochReport], None] | None,
    device: str,
) -> EnergyTrainer:
    """Train an energy model, from its checkpoint where there is one."""
    config = _config(fit)
    place = (*FOLDER, fit.address(data), "checkpoint.pt")
    fields = density_fields(config)
    shape = {name: fields[name] for name in ("weighted", "shrinkage") if name in fields}
    features = torch.tensor(data.features, device=device)
    with torch_threads(config.threads):
        mixture = GaussianMixture.from_statistics(data.statistics, **shape)
        settings = config.settings(data.statistics, mixture)
        trainer = EnergyTrainer(features, mixture, settings, seed=fit.seed, parallel=workers)
        if storage.exists(*place):
            content = io.BytesIO(storage.read_bytes(*place))
            trainer.load(torch.load(content, map_location="cpu", weights_only=True))
        while len(trainer.history) < settings.epochs:
            report = trainer.epoch()
            if workers.rank == 0:
                file = io.BytesIO()
                torch.save(trainer.state(), file)
                storage.write_bytes(file.getvalue(), *place)
            if on_epoch is not None:
                on_epoch(report)
    return trainer


def _train_with_ray(
    fits: Sequence[Fit],
    data: FitData,
    storage: Storage,
    compute: ComputeConfig,
    on_epoch: OnEpoch | None,
) -> None:
    import ray

    report = None if on_epoch is None else lambda n, figures: on_epoch(fits[n], figures)
    with forwarding(report) as reports:
        content = {"fits": list(fits), "data": ray.put(data), "storage": storage}
        run_on_workers(_worker, {**content, "reports": reports}, storage, compute)


def _raise_failures(fits: Sequence[Fit], data: FitData, storage: Storage) -> None:
    """What workers wrote down in place of a record, as one line for the user."""
    for fit in fits:
        place = (*FOLDER, fit.address(data), "failed.json")
        if not is_fitted(storage, fit.address(data)) and storage.exists(*place):
            raise UserError(str(storage.read_json(*place)["error"]))


def _worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs: the trainings, one after the other."""
    import ray.train.torch

    place = ray.train.get_context()
    workers = Workers(place.get_world_rank(), place.get_world_size())
    data, storage = ray.get(config["data"]), config["storage"]
    for number, fit in enumerate(config["fits"]):
        if not is_fitted(storage, fit.address(data)):
            send = sender(config["reports"] if workers.rank == 0 else None, number)
            on_epoch = _for_fit(send)
            device = str(ray.train.torch.get_device())
            try:
                _fit_and_keep(fit, data, storage, workers, on_epoch, device)
            except UserError as error:
                # A restart would end the same way: the driver tells the user instead.
                if workers.rank == 0:
                    failed = (*FOLDER, fit.address(data), "failed.json")
                    storage.write_json({"error": str(error)}, *failed)
        wait_for_all(workers)


def _for_fit(send: Callable[[EpochReport], None] | None) -> OnEpoch | None:
    return None if send is None else lambda _, report: send(report)
