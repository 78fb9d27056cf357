"""The cache of trained heads: each found again by what decides its weights.

cache/heads/ADDRESS/best/ last/     head.json, head.safetensors of a `Predictor`
cache/heads/ADDRESS/manifest.json   written last: a `HeadRecord`
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipelines.backbones import clip as backbones
from pipelines.backbones.clip import BackboneConfig
from pipelines.code_digest import ROOT, Code, code_of
from pipelines.config import digest
from pipelines.data.storage import Storage
from pipelines.finetune.loop import Trained, TrainingData, TrainingJob, train_in_process
from pipelines.finetune.record import HeadRecord
from pipelines.heads import HEADS, Predictor
from pipelines.methods import METHODS, MethodConfig, training_setting


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


def is_trained(storage: Storage, head: str) -> bool:
    """Whether the head at that address is complete."""
    return storage.exists("cache", "heads", head, "manifest.json")


def read_record(storage: Storage, head: str) -> HeadRecord:
    """The record of the trained head at that address.

    Raises:
        UserError: for a damaged file, or one of another layout.
    """
    place = ("cache", "heads", head, "manifest.json")
    return HeadRecord.from_json(storage.read_bytes(*place), storage.path(*place))


def load_predictor(
    storage: Storage, head: str, which: Literal["best", "last"] = "best"
) -> Predictor:
    """The trained head at that address."""
    folder = ("cache", "heads", head, which)
    names = ("head.json", "head.safetensors")
    return Predictor.from_files({name: storage.read_bytes(*folder, name) for name in names})


def keep(
    head: str, job: TrainingJob, data: TrainingData, trained: Trained, storage: Storage
) -> None:
    """Write what training gave under its address."""
    folder = ("cache", "heads", head)
    for which, predictor in (("best", trained.predictor), ("last", trained.last)):
        for name, content in predictor.files().items():
            storage.write_bytes(content, *folder, which, name)
    record = HeadRecord(
        setting=training_setting(job.method),
        seed=job.seed,
        data=data.address,
        code=head_code(job.method).digest,
        best_epoch=trained.best_epoch,
        history=trained.history,
    )
    storage.write_bytes(record.to_json(), *folder, "manifest.json")
