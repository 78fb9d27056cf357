"""The cache of trained networks: each found again by what decides its weights.

cache/networks/ADDRESS/weights.safetensors   a state dict by the architecture's own names
cache/networks/ADDRESS/manifest.json         written last: a `NetworkRecord`, and the seal of these
cache/networks/ADDRESS/checkpoint.pt         state of a training under way, sealed by itself
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from pydantic import JsonValue

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.trainable import trainable
from pipelines.code_digest import ROOT, Code, code_of
from pipelines.config import UserError, digest
from pipelines.data import kept
from pipelines.data.kept import Entry
from pipelines.data.storage import Storage
from pipelines.methods import METHODS, MethodConfig, training_setting
from pipelines.train.data import NetworkData, NetworkJob, TrainedNetwork
from pipelines.train.loop import train_network
from pipelines.train.record import NetworkRecord

WEIGHTS = "weights.safetensors"


def network_code(method: MethodConfig, backbone: BackboneConfig, *, root: Path = ROOT) -> Code:
    """The code that decides the weights: the loop, the method, its losses, the architecture."""
    plugin = METHODS[method.name].Config.__module__
    return code_of(train_network, trainable, plugin, *backbones.code(backbone), root=root)


def network_setting(method: MethodConfig) -> dict[str, JsonValue]:
    """What of the method's settings decides the weights: not how the network is judged."""
    if (how := method.network) is not None:
        # Of a backbone its identity stands in the address, not where its file is.
        train = how.model_copy(update={"backbone": None})
        method = method.model_copy(update={"head": method.head.model_copy(update={"train": train})})
    setting = training_setting(method)
    # Heads keep the correction of the predicted class beside their weights; a network does not.
    del setting["adjust_logits"]
    return setting


@dataclass(frozen=True)
class AddressedNetwork:
    """A training, where its network lies below `cache/networks/`, and the digest of its code."""

    job: NetworkJob
    address: str
    code: str


def address(job: NetworkJob, data: NetworkData) -> AddressedNetwork:
    """The job with its place in the cache."""
    code = network_code(job.method, job.backbone).digest
    content = {
        "method": network_setting(job.method),
        "seed": job.seed,
        "data": data.address,
        "backbone": dict(backbones.identity(_as_started(job))),
        "code": code,
    }
    if job.trained is not None:
        content["trained"] = job.trained
    if job.method.needs_outlier_counts and job.outlier_counts is not None:
        content["outlier_counts"] = list(job.outlier_counts)
    return AddressedNetwork(job, digest(content), code)


def _as_started(job: NetworkJob) -> BackboneConfig:
    """The backbone as far as it decides the network: where its weights do not, without them."""
    if job.start == "random" or job.trained is not None:
        return job.backbone.model_copy(update={"untrained": True})
    return job.backbone


def entry(storage: Storage, network: str) -> Entry[NetworkRecord]:
    """The folder of the network at that address."""
    return Entry(storage, ("cache", "networks", network), NetworkRecord)


def is_trained(storage: Storage, network: str) -> bool:
    """Whether the network at that address is complete and as it was written.

    What of it is damaged is removed, and so is a damaged checkpoint of its training.
    """
    if entry(storage, network).find() is not None:
        return True
    load_checkpoint(storage, network)
    return False


def keep(
    place: AddressedNetwork, data: NetworkData, trained: TrainedNetwork, storage: Storage
) -> None:
    """Write what training gave under its address."""
    job = place.job
    record = NetworkRecord(
        setting=network_setting(job.method),
        seed=job.seed,
        data=data.address,
        code=place.code,
        class_names=data.class_names,
        history=trained.history,
    )
    state = {name: value.contiguous() for name, value in trained.state.items()}
    entry(storage, place.address).write(record, {WEIGHTS: safetensors.torch.save(state)})


def load_checkpoint(storage: Storage, network: str) -> bytes | None:
    """The state of a training under way; a damaged one is removed."""
    return kept.find_file(storage, *_checkpoint(network))


def save_checkpoint(storage: Storage, network: str, content: bytes) -> None:
    """Keep the state of a training."""
    kept.write_file(storage, content, *_checkpoint(network))


def _checkpoint(network: str) -> tuple[str, ...]:
    return "cache", "networks", network, "checkpoint.pt"


def trained_backbone(
    backbone: BackboneConfig, network: str, storage: Storage, name: str
) -> BackboneConfig:
    """The trained network as a backbone like any other: its weights, and its classes.

    Args:
        backbone: that it was trained from, resolved.
        network: its address.
        storage: where it is kept.
        name: of the new backbone, for messages.

    Raises:
        Damaged: where it is not as it was written.
        UserError: where the storage is no folder of this machine.
    """
    record = entry(storage, network).check()
    if not storage.is_local:
        raise UserError(
            f"storage {storage.root}: a trained network is read as a file; allowed: a folder that "
            "every machine sees"
        )
    return backbone.model_copy(
        update={
            "name": name,
            "path": str(storage.local("cache", "networks", network, WEIGHTS)),
            "class_names": list(record.class_names),
            "rename": {},
            "untrained": False,
        }
    )
