"""The cache of trained heads: each found again by what decides its weights.

cache/heads/ADDRESS/best/ last/     head.json, head.safetensors of a `Predictor`
cache/heads/ADDRESS/manifest.json   written last: a `HeadRecord`, and the seals of these files
cache/heads/ADDRESS/checkpoint.pt   state after the last finished epoch, sealed by itself
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.code_digest import ROOT, Code, code_of
from pipelines.config import digest
from pipelines.data import kept
from pipelines.data.kept import Entry
from pipelines.data.storage import Storage
from pipelines.finetune.loop import Trained, TrainingData, TrainingJob, train_in_process
from pipelines.finetune.record import HeadRecord
from pipelines.heads import HEADS, Predictor
from pipelines.methods import METHODS, MethodConfig, training_setting

# The files of a predictor.
PREDICTOR = ("head.json", "head.safetensors")


def head_code(method: MethodConfig, *, root: Path = ROOT) -> Code:
    """The code that decides a head of this method: the loop, the method, its losses, the head.

    Other methods and heads are not in it, nor is anything that judges.

    Args:
        method: whose settings name the method and the head.
        root: the folder that holds the project's packages.
    """
    plugins = (METHODS[method.name], HEADS[method.head.name])
    return code_of(train_in_process, *(plugin.Config.__module__ for plugin in plugins), root=root)


def address(job: TrainingJob, data: TrainingData, backbone: BackboneConfig) -> str:
    """Where the head of this training job lies below `cache/heads/`."""
    content = {
        "method": training_setting(job.method),
        "seed": job.seed,
        "data": data.address,
        "backbone": dict(backbones.identity(backbone)),
        "code": head_code(job.method).digest,
    }
    if job.method.needs_outlier_counts and data.outlier_counts is not None:
        content["outlier_counts"] = data.outlier_counts.tolist()
    return digest(content)


def entry(storage: Storage, head: str) -> Entry[HeadRecord]:
    """The folder of the head at that address."""
    return Entry(storage, ("cache", "heads", head), HeadRecord)


def is_trained(storage: Storage, head: str) -> bool:
    """Whether the head at that address is complete and as it was written.

    What of it is damaged is removed, and so is a damaged checkpoint of its training.
    """
    if entry(storage, head).find() is not None:
        return True
    load_checkpoint(storage, head)
    return False


def read_record(storage: Storage, head: str) -> HeadRecord:
    """The record of the trained head at that address.

    Raises:
        Damaged: where it is not as it was written.
    """
    return entry(storage, head).read()


def load_predictor(
    storage: Storage, head: str, which: Literal["best", "last"] = "best"
) -> Predictor:
    """The trained head at that address.

    Raises:
        Damaged: where it is not as it was written.
    """
    _, files = entry(storage, head).read_all([f"{which}/{name}" for name in PREDICTOR])
    return Predictor.from_files({name: files[f"{which}/{name}"] for name in PREDICTOR})


def load_checkpoint(storage: Storage, head: str) -> bytes | None:
    """The state of a training after its last finished epoch; a damaged one is removed."""
    return kept.find_file(storage, *_checkpoint(head))


def save_checkpoint(storage: Storage, head: str, content: bytes) -> None:
    """Keep the state of a training."""
    kept.write_file(storage, content, *_checkpoint(head))


def _checkpoint(head: str) -> tuple[str, ...]:
    return "cache", "heads", head, "checkpoint.pt"


def keep(
    head: str, job: TrainingJob, data: TrainingData, trained: Trained, storage: Storage
) -> None:
    """Write what training gave under its address."""
    files = {
        f"{which}/{name}": content
        for which, predictor in (("best", trained.predictor), ("last", trained.last))
        for name, content in predictor.files().items()
    }
    record = HeadRecord(
        setting=training_setting(job.method),
        seed=job.seed,
        data=data.address,
        code=head_code(job.method).digest,
        best_epoch=trained.best_epoch,
        history=trained.history,
    )
    entry(storage, head).write(record, files)
