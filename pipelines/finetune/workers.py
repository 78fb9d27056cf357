"""Ray Train workers: how training jobs, and energy models, run on them and report to the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.compute.ray_train import forwarding, run_on_workers, sender, wait_for_all
from pipelines.data.storage import Storage
from pipelines.finetune.cache import is_trained, keep, load_checkpoint, save_checkpoint
from pipelines.finetune.loop import EpochReport, TrainingData, TrainingJob, train_in_process
from pipelines.heads.models import Backbone
from pipelines.heads.parallel import Workers

if TYPE_CHECKING:  # Ray takes seconds to import: only where workers are started
    import ray
    from ray.util.queue import Queue

OnEpoch: TypeAlias = Callable[[TrainingJob, EpochReport], None]


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
        wait_for_all(workers.world)


# Classes from which sharing their encoding saves more than its collectives cost;
# `python -m jobs.benchmark suite=prompts only=workers` measures it for ViT-B/16's text tower.
CLASS_PARALLEL_FROM = 64


def _split(job: TrainingJob, data: TrainingData) -> Literal["rows", "classes"]:
    many = len(data.class_names) >= CLASS_PARALLEL_FROM
    return "classes" if many and job.method.head.class_parallel else "rows"


def _for_job(send: Callable[[EpochReport], None] | None) -> OnEpoch | None:
    return None if send is None else lambda _, report: send(report)
