"""Features in, trained heads out: what is missing of the cache of heads is trained.

Each `TrainingJob` (method and seed) gives a head under `cache/heads/ADDRESS/`, found again by
content: what of the method's settings decides a head, the seed, the data's address, the backbone
and the code that trains. One Ray Train run trains all jobs that are missing, one after the other,
because its start-up costs far more than a head. The state after each epoch lies beside the result,
so a killed worker (Ray Train starts it anew) and a killed driver (started again by the user) both
go on from the last finished epoch and end with the weights of an undisturbed run.

    cache/heads/ADDRESS/best/ last/     head.json, head.safetensors of a `Predictor`
    cache/heads/ADDRESS/checkpoint.pt   state after the last finished epoch
    cache/heads/ADDRESS/manifest.json   written last: a `HeadRecord`
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune.cache import address, is_trained
from pipelines.finetune.loop import TrainingData, TrainingJob, check
from pipelines.finetune.workers import AddressedJob, OnEpoch, train_and_keep, train_with_ray
from pipelines.heads.parallel import Workers

logger = logging.getLogger(__name__)


def train(
    jobs: Sequence[TrainingJob],
    data: TrainingData,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    compute: ComputeConfig,
    mode: Literal["ray", "in_process"] = "ray",
    on_epoch: OnEpoch | None = None,
) -> list[str]:
    """Train the jobs whose heads the cache does not hold.

    Args:
        jobs: what to train.
        data: the same for all jobs.
        backbone: resolved.
        storage: where heads and checkpoints are kept.
        compute: number of Ray Train workers and their resources.
        mode: "ray" needs an initialised Ray when a head is missing; "in_process" never does and
            gives the same bytes as Ray Train with one worker.
        on_epoch: called on the driver with a job and an epoch's report. After a restart the
            epochs that were lost come again.

    Returns:
        The address of each job's head, in order.

    Raises:
        UserError: where the data cannot train a job, before any training starts.
    """
    for job in jobs:
        check(job, data)
    addressed = [AddressedJob(job, address(job, data, backbone)) for job in jobs]
    by_address = {head.address: head for head in addressed}
    missing = [head for head in by_address.values() if not is_trained(storage, head.address)]
    logger.info("finetune: %d heads, %d of them to train", len(jobs), len(missing))
    # A classifier's own layer is read from its file: no worker is started for it.
    needs_workers = backbones.has_text(backbone) or any(
        head.job.method.head.trainable for head in missing
    )
    if missing and mode == "ray" and needs_workers:
        train_with_ray(missing, data, backbone, storage, compute=compute, on_epoch=on_epoch)
    elif missing:
        network = backbones.load(backbone)
        for head in missing:
            train_and_keep(head, data, network, storage, workers=Workers(), on_epoch=on_epoch)
    return [head.address for head in addressed]
