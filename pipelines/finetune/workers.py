"""Ray Train workers: how training jobs, and energy models, run on them and report to the driver."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch.distributed

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune.cache import is_trained, keep, load_checkpoint, save_checkpoint
from pipelines.finetune.loop import EpochReport, TrainingData, TrainingJob, train_in_process
from pipelines.heads.base import Backbone
from pipelines.heads.parallel import Workers

if TYPE_CHECKING:  # Ray takes seconds to import: only where workers are started
    import ray
    from ray.util.queue import Queue

OnEpoch: TypeAlias = Callable[[TrainingJob, EpochReport], None]
SentT = TypeVar("SentT")


@dataclass(frozen=True)
class AddressedJob:
    """A training job and the address of its head."""

    job: TrainingJob
    address: str


@dataclass(frozen=True, eq=False)
class _Sent:
    """What every worker is given: the jobs, their data in Ray's object store, and whom to tell."""

    jobs: Sequence[AddressedJob]
    data: ray.ObjectRef[TrainingData]
    backbone: BackboneConfig
    storage: Storage
    reports: Queue | None


@dataclass(frozen=True)
class _StoredCheckpoint:
    """The state of one job's training in storage; only one worker writes it."""

    storage: Storage
    address: str
    writes: bool

    def load(self) -> bytes | None:
        return load_checkpoint(self.storage, self.address)

    def save(self, content: bytes) -> None:
        if self.writes:
            save_checkpoint(self.storage, self.address, content)


def train_and_keep(
    job: AddressedJob,
    data: TrainingData,
    network: Backbone,
    storage: Storage,
    *,
    workers: Workers,
    on_epoch: OnEpoch | None,
) -> None:
    """Train one head and write it under its address; of several workers the first writes."""
    trained = train_in_process(
        job.job,
        data,
        network,
        workers=workers,
        checkpoint=_StoredCheckpoint(storage, job.address, writes=workers.rank == 0),
        on_epoch=(lambda report: on_epoch(job.job, report)) if on_epoch else None,
    )
    if workers.rank == 0:
        keep(job.address, job.job, data, trained, storage)


def train_with_ray(
    jobs: Sequence[AddressedJob],
    data: TrainingData,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    compute: ComputeConfig,
    on_epoch: OnEpoch | None,
) -> None:
    """Train the jobs one after the other in one Ray Train run, each on all of its workers."""
    import ray

    report = None if on_epoch is None else lambda n, figures: on_epoch(jobs[n].job, figures)
    with forwarding(report) as reports:
        sent = _Sent(list(jobs), ray.put(data), backbone, storage, reports)
        run_on_workers(_worker, sent, storage, compute)


def run_on_workers(
    worker: Callable[[SentT], None],
    sent: SentT,
    storage: Storage,
    compute: ComputeConfig,
) -> None:
    """One Ray Train run: `worker(sent)` on each of `compute.train_workers` workers."""
    import ray.train.torch

    # Read by Ray Train's controller, which inherits it: the default polls every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    name = f"train-{uuid.uuid4().hex[:8]}"
    trainer = ray.train.torch.TorchTrainer(
        # Not as `train_loop_config`: that takes a dictionary only.
        lambda: worker(sent),
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
    try:
        _in_a_thread(trainer.fit)
    finally:
        if storage.is_local:
            # What Ray Train keeps of the run; the state of each training lies with its head.
            shutil.rmtree(storage.local("cache", "ray_train", name), ignore_errors=True)


def _in_a_thread(work: Callable[[], object]) -> None:
    """Run `work` and wait: on the main thread, Ray Train would answer Ctrl-C in our place.

    A wait that is interrupted leaves the thread behind, and Ray's end ends its work.
    """
    done: Future[object] = Future()

    def call() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, name="ray-train", daemon=True).start()
    done.result()


def _worker(sent: _Sent) -> None:
    """What every Ray Train worker runs: the missing jobs, one after the other."""
    import ray.train.torch

    place = ray.train.get_context()
    rank, world = place.get_world_rank(), place.get_world_size()
    data, storage = ray.get(sent.data), sent.storage
    network = backbones.load(sent.backbone, device=str(ray.train.torch.get_device()))
    reports = sent.reports if rank == 0 else None
    for number, job in enumerate(sent.jobs):
        workers = Workers(rank, world, _split(job.job, data))
        if not is_trained(storage, job.address):
            on_epoch = _for_job(sender(reports, number))
            train_and_keep(job, data, network, storage, workers=workers, on_epoch=on_epoch)
        wait_for_all(workers)


# Classes from which sharing their encoding saves more than its collectives cost;
# `python -m jobs.benchmark suite=prompts only=workers` measures it for ViT-B/16's text tower.
CLASS_PARALLEL_FROM = 64


def _split(job: TrainingJob, data: TrainingData) -> Literal["rows", "classes"]:
    many = len(data.class_names) >= CLASS_PARALLEL_FROM
    return "classes" if many and job.method.head.class_parallel else "rows"


def _for_job(send: Callable[[EpochReport], None] | None) -> OnEpoch | None:
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
        torch.distributed.barrier()


@contextmanager
def forwarding(on_report: Callable[[int, EpochReport], None] | None) -> Iterator[Queue | None]:
    """A queue whose (job number, report) a thread of the driver hands on until the block ends."""
    if on_report is None:
        yield None
        return
    from ray.util.queue import Empty, Queue

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
