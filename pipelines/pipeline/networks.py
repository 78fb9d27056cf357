"""What the stage train is handed: the images, and the methods that train whole networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.backbones import classifier
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.network_training import NetworkTraining
from pipelines.config import digest, plain
from pipelines.embed import leaks
from pipelines.finetune.logged import log_trainings
from pipelines.methods import MethodConfig
from pipelines.pipeline import network_sweep
from pipelines.records import HeadKey
from pipelines.run import Run
from pipelines.settings.config import searched_networks
from pipelines.sweep.train_result import TrainResult
from pipelines.train import prior
from pipelines.train import stage as train
from pipelines.train.cache import address, entry, trained_backbone
from pipelines.train.data import NetworkData, NetworkJob
from pipelines.train.image_set import network_data, tables_of
from pipelines.train.image_table import ImageTable
from pipelines.train.images import Making
from pipelines.train.result import NetworkRef


def hand_train(run: Run) -> TrainResult:
    """The networks of every method that trains one, for every seed.

    Raises:
        UserError: where an image serves two purposes (`pipelines.embed.leaks`), and what
            `pipelines.train.stage.train` raises.
    """
    methods, swept = dict(run.config.methods), None
    waiting = {n: m.network for n, m in run.config.methods.items() if m.network is not None}
    images = _images(run, waiting)
    trained: dict[HeadKey, str] = {}
    while waiting:  # what others start from comes first
        ready = _together(run, waiting)
        for found in trained.values():
            entry(run.storage, found).check()  # what of it is damaged is trained anew
        for seen in {images[name].data.address: images[name] for name in ready}.values():
            names = [name for name in ready if images[name] is seen]
            first = {name: _job(run, seen.data, name, methods, 0, trained) for name in names}
            swept = network_sweep.search(run, first, seen.data, seen.tables, swept)
            methods |= {} if swept is None else {n: c.setting for n, c in swept.methods.items()}
            jobs: dict[HeadKey, NetworkJob] = {}
            for key in (HeadKey(method=n, seed=s) for n in names for s in range(run.config.seeds)):
                jobs[key] = _job(run, seen.data, key.method, methods, key.seed, trained)
                trained[key] = address(jobs[key], seen.data).address
            _train(run, seen.data, jobs)
        waiting = {name: how for name, how in waiting.items() if name not in ready}
    keys = [key for name in run.config.methods for key in trained if key.method == name]
    networks = tuple(NetworkRef(key=key, address=trained[key]) for key in keys)
    return TrainResult(networks=networks, swept=swept)


def _together(run: Run, waiting: Mapping[str, NetworkTraining]) -> list[str]:
    """Methods that one run of workers can train, each after the one whose networks it starts from.

    A search of settings, and a count of the classes of outliers, need trained weights, so such a
    method waits until the networks that it starts from are trained. A method that starts from a
    searched one waits too: which networks it starts from is known after the search.
    """
    searched = set(searched_networks(run.config))
    needs_weights = searched | {n for n in waiting if run.config.methods[n].needs_outlier_counts}
    ready = [name for name, how in waiting.items() if how.start not in waiting]
    while more := [
        name
        for name, how in waiting.items()
        if name not in (*ready, *needs_weights) and how.start in ready and how.start not in searched
    ]:
        ready += more
    return ready


def _job(
    run: Run,
    data: NetworkData,
    name: str,
    methods: Mapping[str, MethodConfig],
    seed: int,
    trained: Mapping[HeadKey, str],
) -> NetworkJob:
    """A training, on the backbone or on the network that it starts from."""
    method, backbone = methods[name], run.backbone_for(name)
    assert method.network is not None
    start = HeadKey(method=method.network.start, seed=seed)
    first, counts = trained.get(start), None
    if method.needs_outlier_counts:
        judging = backbone
        if first is not None:
            judging = trained_backbone(backbone, first, run.storage, str(start))
        counts = _counts(run, data, judging)
    return NetworkJob(method, seed, backbone, first, counts)


def _counts(run: Run, data: NetworkData, backbone: BackboneConfig) -> tuple[int, ...]:
    """The outliers that a backbone takes for each class."""
    assert data.outliers is not None  # the benchmark has them, or the run had been refused
    counts = prior.measure(
        data.outliers,
        data.address,
        data.class_names,
        backbone,
        run.storage,
        with_ray=run.config.training == "ray",
    )
    return tuple(counts.tolist())


def _train(run: Run, data: NetworkData, jobs: Mapping[HeadKey, NetworkJob]) -> None:
    """Train the networks of these jobs that are missing, and log them."""
    log_trainings(
        "train",
        jobs,
        lambda on_report: train.train(
            list(jobs.values()),
            data,
            run.storage,
            compute=run.config.compute,
            mode=run.config.training,
            on_report=on_report,
        ),
        lambda address: entry(run.storage, address).read().history,
        tracker=run.tracker,
        parent=run.tracking_run,
        on_progress=run.observer.progress,
    )


@dataclass(frozen=True, eq=False)
class _Images:
    """The benchmark's images as a backbone sees them: decoded, by source, and those that train."""

    tables: Mapping[str, ImageTable]
    data: NetworkData


def _images(run: Run, names: Iterable[str]) -> dict[str, _Images]:
    """By method; of equal preprocessing one and the same."""
    made: dict[str, _Images] = {}
    found = {}
    for name in names:
        backbone = run.backbone_for(name)
        how = digest([backbone.lossless_to, plain(classifier.preprocessing(backbone))])
        if how not in made:
            tables = _tables(run, backbone)
            made[how] = _Images(tables, network_data(run.benchmark, tables))
        found[name] = made[how]
    return found


def _tables(run: Run, backbone: BackboneConfig) -> dict[str, ImageTable]:
    """The decoded images, once it is known that none serves two purposes."""
    making = Making(
        max_rejected=run.config.embed.max_rejected,
        with_ray=run.config.training == "ray",
        at_once=run.config.compute.at_once,
        on_progress=lambda done, total, _: run.observer.progress(done, total, "images decoded"),
    )
    tables = tables_of(run.benchmark, backbone, run.storage, run.config.embed, making)
    leaks.refuse(run.benchmark, tables, run.storage, ("runs", run.id, "shared_images.json"))
    return tables
