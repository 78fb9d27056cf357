"""Images in, trained networks out: what is missing of the cache of networks is trained.

Each `NetworkJob` (method and seed) gives a network under `cache/networks/ADDRESS/`, found again by
content: what of the method's settings decides it, the seed, the images, the architecture with the
weights that it starts from, and the code that trains. One Ray Train run trains all jobs that are
missing, one after the other. The state of a training lies beside its result, so a killed worker
(Ray Train starts it anew) and a killed driver (started again by the user) both go on from it and
end with the weights of an undisturbed run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pipelines.backbones import network as backbones
from pipelines.compute.cluster import ComputeConfig
from pipelines.compute.ray_train import forwarding, run_on_workers, sender, wait_for_all
from pipelines.data.storage import Storage
from pipelines.heads.parallel import Workers
from pipelines.ood.seeds import stream
from pipelines.train.cache import (
    AddressedNetwork,
    address,
    is_trained,
    keep,
    load_checkpoint,
    save_checkpoint,
    trained_backbone,
)
from pipelines.train.data import EpochReport, NetworkData, NetworkJob, check
from pipelines.train.loop import OnNetwork, train_network

if TYPE_CHECKING:  # Ray takes seconds to import: only where workers are started
    import ray
    from ray.util.queue import Queue

logger = logging.getLogger(__name__)

OnReport: TypeAlias = Callable[[NetworkJob, EpochReport], None]


def train(
    jobs: Sequence[NetworkJob],
    data: NetworkData,
    storage: Storage,
    *,
    compute: ComputeConfig,
    mode: Literal["ray", "in_process"] = "ray",
    on_report: OnReport | None = None,
) -> list[str]:
    """Train the jobs whose networks the cache does not hold.

    Args:
        jobs: what to train; one that starts from another's network comes after it.
        data: the same for all jobs.
        storage: where networks and checkpoints are kept.
        compute: number of Ray Train workers and their resources.
        mode: "ray" needs an initialised Ray where a network is missing; "in_process" never does
            and gives the same bytes as Ray Train with one worker.
        on_report: called on the driver with a job and an epoch's report. After a restart the
            epochs that were lost come again.

    Returns:
        The address of each job's network, in order.

    Raises:
        UserError: where the data cannot train a job, before any training starts, and where a loss
            stops being a number.
    """
    for job in jobs:
        check(job, data)
    addressed = [address(job, data) for job in jobs]
    every: dict[str, AddressedNetwork] = {}
    for place in addressed:  # of methods that share a network, the first is told of its training
        every.setdefault(place.address, place)
    missing = [place for place in every.values() if not is_trained(storage, place.address)]
    logger.info("train: %d networks, %d of them to train", len(jobs), len(missing))
    if missing and mode == "ray":
        _train_with_ray(missing, data, storage, compute=compute, on_report=on_report)
    for place in missing if mode == "in_process" else ():
        send = None if on_report is None else _told(on_report, place.job)
        _train_and_keep(place, _Given(data, storage), Workers(), "cpu", send)
    return [place.address for place in addressed]


def train_here(
    job: NetworkJob,
    data: NetworkData,
    storage: Storage,
    *,
    device: str = "cpu",
    on_network: OnNetwork | None = None,
) -> str:
    """Train one job in this process where the cache does not hold its network.

    Args:
        job: what to train.
        data: what it is trained on.
        storage: where networks and checkpoints are kept.
        device: where it is trained.
        on_network: called after each epoch that is trained with its number and the network.

    Returns:
        The network's address, that of `train` for the same job.

    Raises:
        UserError: what `train` raises.
    """
    check(job, data)
    place = address(job, data)
    if not is_trained(storage, place.address):
        _train_and_keep(place, _Given(data, storage), Workers(), device, on_network=on_network)
    return place.address


def _told(on_report: OnReport, job: NetworkJob) -> Callable[[EpochReport], None]:
    return lambda report: on_report(job, report)


@dataclass(frozen=True)
class _Given:
    """What every training of a run has in common."""

    data: NetworkData
    storage: Storage


@dataclass(frozen=True)
class _StoredCheckpoint:
    """The state of one training in storage; only one worker writes it."""

    storage: Storage
    address: str
    writes: bool

    def load(self) -> bytes | None:
        return load_checkpoint(self.storage, self.address)

    def save(self, content: bytes) -> None:
        if self.writes:
            save_checkpoint(self.storage, self.address, content)


def _train_and_keep(
    place: AddressedNetwork,
    given: _Given,
    workers: Workers,
    device: str,
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_network: OnNetwork | None = None,
) -> None:
    """Train one network and write it under its address; of several workers the first writes."""
    job, backbone = place.job, place.job.backbone
    if job.trained is not None:
        backbone = trained_backbone(backbone, job.trained, given.storage, job.method.name)
    network = backbones.trainable(
        backbone, given.data.class_names, job.start, stream(job.seed, "network")
    )
    trained = train_network(
        job,
        given.data,
        network.to(device),
        workers=workers,
        checkpoint=_StoredCheckpoint(given.storage, place.address, writes=workers.rank == 0),
        on_epoch=on_epoch,
        on_network=on_network,
    )
    if workers.rank == 0:
        keep(place, given.data, trained, given.storage)


@dataclass(frozen=True, eq=False)
class _Sent:
    """What every worker is given: the jobs, what they share, and whom to tell."""

    places: Sequence[AddressedNetwork]
    given: ray.ObjectRef[_Given]
    reports: Queue | None


def _train_with_ray(
    places: Sequence[AddressedNetwork],
    data: NetworkData,
    storage: Storage,
    *,
    compute: ComputeConfig,
    on_report: OnReport | None,
) -> None:
    """Train the jobs one after the other in one Ray Train run, each on all of its workers."""
    import ray

    tell = None if on_report is None else lambda n, figures: on_report(places[n].job, figures)
    with forwarding(tell) as reports:
        sent = _Sent(list(places), ray.put(_Given(data, storage)), reports)
        run_on_workers(_worker, sent, storage, compute)


def _worker(sent: _Sent) -> None:
    """What every Ray Train worker runs: the missing jobs, one after the other."""
    import ray.train.torch

    context, given = ray.train.get_context(), ray.get(sent.given)
    workers = Workers(context.get_world_rank(), context.get_world_size())
    device = str(ray.train.torch.get_device())
    for number, place in enumerate(sent.places):
        if not is_trained(given.storage, place.address):
            send = sender(sent.reports if workers.rank == 0 else None, number)
            _train_and_keep(place, given, workers, device, send)
        wait_for_all(workers.world)
