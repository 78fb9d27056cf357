"""What the stage train is handed: the images, and the methods that train whole networks."""

from __future__ import annotations

from dataclasses import replace

from pipelines.config import UserError
from pipelines.embed import leaks
from pipelines.finetune.logged import log_trainings
from pipelines.records import HeadKey
from pipelines.run import Run
from pipelines.train import prior
from pipelines.train import stage as train
from pipelines.train.cache import entry
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
    data = _data(run)
    jobs = {
        HeadKey(method=name, seed=seed): NetworkJob(method, seed)
        for name, method in run.config.methods.items()
        if method.network is not None
        for seed in range(run.config.seeds)
    }
    addresses = log_trainings(
        "train",
        jobs,
        lambda on_report: train.train(
            list(jobs.values()),
            data,
            run.backbone,
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
    counts = data.outlier_counts
    return TrainResult(
        networks=tuple(NetworkRef(key=key, address=place) for key, place in addresses.items()),
        outlier_counts=None if counts is None else tuple(counts.tolist()),
    )


def _data(run: Run) -> NetworkData:
    """Decoded images; with the outliers counted by class where a method asks for it."""
    making = Making(
        max_rejected=run.config.embed.max_rejected,
        with_ray=run.config.training == "ray",
        at_once=run.config.compute.at_once,
        on_progress=lambda done, total, _: run.observer.progress(done, total, "images decoded"),
    )
    tables = tables_of(run.benchmark, run.backbone, run.storage, run.config.embed, making)
    leaks.refuse(run.benchmark, tables, run.storage, ("runs", run.id, "shared_images.json"))
    data = network_data(run.benchmark, tables)
    if not any(m.network and m.needs_outlier_counts for m in run.config.methods.values()):
        return data
    if run.backbone.untrained or data.outliers is None:
        raise UserError(
            f"backbone {run.backbone.name}: balanced energy counts the classes that a trained "
            "network takes outliers for; give it weights, or leave the method out"
        )
    counts = prior.measure(
        data.outliers,
        data.address,
        data.class_names,
        run.backbone,
        run.storage,
        with_ray=run.config.training == "ray",
    )
    return replace(data, outlier_counts=counts)
