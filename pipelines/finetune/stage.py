"""Features in, trained heads out: the Ray Train stage.

Each `TrainingJob` (method and seed) gives a head under `cache/heads/ADDRESS/`, found again by
content: the resolved setting, the seed, the data's address, the backbone and the code of the
method. One `TorchTrainer.fit` trains all jobs that are missing, one after the other, because Ray
Train's start-up costs far more than a head. The state after each epoch lies beside the result, so
a killed worker (Ray Train starts it anew) and a killed driver (started again by the user) both go
on from the last finished epoch and end with the weights of an undisturbed run.

    cache/heads/ADDRESS/best/ last/     head.json, head.safetensors of a `Predictor`
    cache/heads/ADDRESS/checkpoint.pt   state after the last finished epoch
    cache/heads/ADDRESS/manifest.json   written last: setting, seed, best epoch, history
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pipelines.backbones import clip as backbones
from pipelines.backbones.clip import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune.cache import address, is_trained, keep
from pipelines.finetune.loop import EpochReport, TrainingData, TrainingJob, check, train_in_process
from pipelines.heads.parallel import Workers

if TYPE_CHECKING:
    from ray.util.queue import Queue

logger = logging.getLogger(__name__)

OnEpoch: TypeAlias = Callable[[TrainingJob, EpochReport], None]


def train(
    cells: Sequence[TrainingJob],
    data: TrainingData,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    compute: ComputeConfig,
    mode: Literal["ray", "in_process"] = "ray",
    on_epoch: OnEpoch | None = None,
) -> list[str]:
    """Train the cells that the cache does not hold.

    Args:
        cells: what to train.
        data: the same for all cells.
        backbone: resolved.
        storage: where heads and checkpoints are kept.
        compute: number of Ray Train workers and their resources.
        mode: "ray" needs an initialised Ray when a cell is missing; "in_process" never does and
            gives the same bytes as Ray Train with one worker.
        on_epoch: called on the driver with a cell and an epoch's report. After a restart the
            epochs that were lost come again.

    Returns:
        The address of each cell's head, in order.

    Raises:
        UserError: where the data cannot train a cell, before any training starts.
    """
    for cell in cells:
        check(cell, data)
    jobs = [_Job(cell, address(cell, data, backbone)) for cell in cells]
    missing = list(
        {job.address: job for job in jobs if not is_trained(storage, job.address)}.values()
    )
    logger.info("finetune: %d heads, %d of them to train", len(jobs), len(missing))
    if missing and mode == "ray":
        _train_with_ray(missing, data, backbone, storage, compute, on_epoch)
    elif missing:
        clip = backbones.load(backbone)
        for job in missing:
            _train_and_keep(job, data, clip, storage, Workers(), on_epoch)
    return [job.address for job in jobs]


@dataclass(frozen=True)
class _Job:
    cell: TrainingJob
    address: str


@dataclass(frozen=True)
class _StoredCheckpoint:
    """The state of one cell's training in storage; only one worker writes it."""

    storage: Storage
    address: str
    writes: bool

    def load(self) -> bytes | None:
        where = ("cache", "heads", self.address, "checkpoint.pt")
        return self.storage.read_bytes(*where) if self.storage.exists(*where) else None

    def save(self, content: bytes) -> None:
        if self.writes:
            self.storage.write_bytes(content, "cache", "heads", self.address, "checkpoint.pt")


def _train_and_keep(
    job: _Job,
    data: TrainingData,
    clip: Any,
    storage: Storage,
    workers: Workers,
    on_epoch: OnEpoch | None,
) -> None:
    trained = train_in_process(
        job.cell,
        data,
        clip,
        workers=workers,
        checkpoint=_StoredCheckpoint(storage, job.address, writes=workers.rank == 0),
        on_epoch=(lambda report: on_epoch(job.cell, report)) if on_epoch else None,
    )
    if workers.rank == 0:
        keep(job.address, job.cell, data, trained, storage)


def _train_with_ray(
    jobs: list[_Job],
    data: TrainingData,
    backbone: BackboneConfig,
    storage: Storage,
    compute: ComputeConfig,
    on_epoch: OnEpoch | None,
) -> None:
    import ray

    report = None if on_epoch is None else lambda n, figures: on_epoch(jobs[n].cell, figures)
    with forwarding(report) as reports:
        content = {"jobs": jobs, "data": ray.put(data), "backbone": backbone, "reports": reports}
        run_on_workers(_worker, {**content, "storage": storage}, storage, compute)


def run_on_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    storage: Storage,
    compute: ComputeConfig,
) -> None:
    """One Ray Train run: `worker(config)` on each of `compute.train_workers` workers."""
    import ray.train.torch

    # Read by Ray Train's controller, which inherits it: the default polls every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    name = f"fit-{uuid.uuid4().hex[:8]}"
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.train_workers,
            use_gpu=compute.train_gpus > 0,
            resources_per_worker={"CPU": 1, "GPU": compute.train_gpus}
            if compute.train_gpus
            else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.path("cache", "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
        ),
    )
    trainer.fit()
    if storage.is_local:
        # Ray Train's own state of this fit; ours lies with the heads.
        shutil.rmtree(storage.local("cache", "ray_train", name), ignore_errors=True)


def _worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs: the missing cells, one after the other."""
    import ray.train.torch

    place = ray.train.get_context()
    rank, world = place.get_world_rank(), place.get_world_size()
    data, storage = ray.get(config["data"]), config["storage"]
    clip = backbones.load(config["backbone"], device=str(ray.train.torch.get_device()))
    reports: Queue | None = config["reports"] if rank == 0 else None
    for number, job in enumerate(config["jobs"]):
        workers = Workers(rank, world, _split(job.cell, data))
        if not is_trained(storage, job.address):
            on_epoch = _for_cell(sender(reports, number))
            _train_and_keep(job, data, clip, storage, workers, on_epoch)
        wait_for_all(workers)


# Classes from which sharing their encoding saves more than its collectives cost;
# `python -m jobs.benchmark suite=prompts only=workers` measures it for ViT-B/16's text tower.
CLASS_PARALLEL_FROM = 64


def _split(cell: TrainingJob, data: TrainingData) -> Literal["rows", "classes"]:
    many = len(data.class_names) >= CLASS_PARALLEL_FROM
    return "classes" if many and cell.method.head.class_parallel else "rows"


def _for_cell(send: Callable[[EpochReport], None] | None) -> OnEpoch | None:
    return None if send is None else lambda _, report: send(report)


def sender(reports: Queue | None, number: int) -> Callable[[EpochReport], None] | None:
    """What puts the reports of job `number` into the driver's queue, where there is one."""
    if reports is None:
        return None
    actor: Any = reports.actor

    def send(report: EpochReport) -> None:
        # Not waited for: training never stands still for a progress line.
        actor.put.remote((number, report))

    return send


def wait_for_all(workers: Workers) -> None:
    """No worker asks what is trained before the first has written it."""
    if workers.world > 1:
        import torch.distributed

        torch.distributed.barrier()


@contextmanager
def forwarding(on_report: Callable[[int, EpochReport], None] | None) -> Iterator[Queue | None]:
    """A queue whose (job number, report) a thread of the driver hands on until the block ends."""
    from ray.util.queue import Empty, Queue

    if on_report is None:
        yield None
        return
    reports, done = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def drain() -> None:
        while not done.is_set() or reports.qsize():
            try:
                number, report = reports.get(timeout=0.2)
            except (Empty, queue.Empty):
                continue
            on_report(number, report)

    thread = threading.Thread(target=drain, name="finetune-reports", daemon=True)
    thread.start()
    try:
        yield reports
    finally:
        done.set()
        thread.join()
        reports.shutdown()
