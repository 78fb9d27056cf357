"""What the stage train is handed: the images, and the methods that train whole networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipelines.backbones import classifier
from pipelines.backbones.description import BackboneConfig
from pipelines.config import digest, plain
from pipelines.embed import leaks
from pipelines.finetune.logged import log_trainings
from pipelines.records import HeadKey
from pipelines.run import Run
from pipelines.train import prior
from pipelines.train import stage as train
from pipelines.train.cache import entry, trained_backbone
from pipelines.train.data import NetworkData, NetworkJob
from pipelines.train.image_set import network_data, tables_of
from pipelines.train.images import Making
from pipelines.train.result import NetworkRef, TrainResult


def hand_train(run: Run) -> TrainResult:
    """The networks of every method that trains one, for every seed.

    Raises:
        UserError: where an image serves two purposes (`pipelines.embed.leaks`), and what
            `pipelines.train.stage.train` raises.
    """
    waiting = {n: m.network for n, m in run.config.methods.items() if m.network is not None}
    images = _images(run, waiting)
    trained: dict[HeadKey, str] = {}
    while waiting:  # what others start from comes first
        ready = [name for name, how in waiting.items() if how.start not in waiting]
        for data in {images[name].address: images[name] for name in ready}.values():
            jobs = {
                HeadKey(method=name, seed=seed): _job(run, data, name, seed, trained)
                for name in ready
                if images[name] is data
                for seed in range(run.config.seeds)
            }
            trained |= _trained(run, data, jobs)
        waiting = {name: how for name, how in waiting.items() if name not in ready}
    keys = [key for name in run.config.methods for key in trained if key.method == name]
    return TrainResult(networks=tuple(NetworkRef(key=key, address=trained[key]) for key in keys))


def _job(
    run: Run, data: NetworkData, name: str, seed: int, trained: Mapping[HeadKey, str]
) -> NetworkJob:
    """A training, on the backbone or on the network that it starts from."""
    method, backbone = run.config.methods[name], run.backbone_for(name)
    assert method.network is not None
    start = method.network.start
    if (first := HeadKey(method=start, seed=seed)) in trained:
        backbone = trained_backbone(backbone, trained[first], run.storage, str(first))
    counts = _counts(run, data, backbone) if method.needs_outlier_counts else None
    return NetworkJob(method, seed, backbone, counts)


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


def _trained(run: Run, data: NetworkData, jobs: Mapping[HeadKey, NetworkJob]) -> dict[HeadKey, str]:
    """The addresses of the networks of these jobs."""
    return log_trainings(
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


def _images(run: Run, names: Iterable[str]) -> dict[str, NetworkData]:
    """By method, the images as its network sees them; of equal preprocessing one and the same."""
    made: dict[str, NetworkData] = {}
    found = {}
    for name in names:
        backbone = run.backbone_for(name)
        how = digest([backbone.lossless_to, plain(classifier.preprocessing(backbone))])
        if how not in made:
            made[how] = _data(run, backbone)
        found[name] = made[how]
    return found


def _data(run: Run, backbone: BackboneConfig) -> NetworkData:
    """The decoded images, once it is known that none serves two purposes."""
    making = Making(
        max_rejected=run.config.embed.max_rejected,
        with_ray=run.config.training == "ray",
        at_once=run.config.compute.at_once,
        on_progress=lambda done, total, _: run.observer.progress(done, total, "images decoded"),
    )
    tables = tables_of(run.benchmark, backbone, run.storage, run.config.embed, making)
    leaks.refuse(run.benchmark, tables, run.storage, ("runs", run.id, "shared_images.json"))
    return network_data(run.benchmark, tables)
