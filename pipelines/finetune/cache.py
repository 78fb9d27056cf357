"""The cache of trained heads: each found again by what decides its weights.

cache/heads/ADDRESS/best/ last/     head.json, head.safetensors of a `Predictor`
cache/heads/ADDRESS/manifest.json   written last: setting, seed, best epoch, history
"""

from __future__ import annotations

import hashlib
import inspect
from types import ModuleType
from typing import Any, Literal

import pipelines.finetune.loop
from pipelines.backbones import clip as backbones
from pipelines.backbones.clip import BackboneConfig
from pipelines.config import digest
from pipelines.data.storage import Storage
from pipelines.finetune.loop import Trained, TrainingData, TrainingJob
from pipelines.heads import HEADS, Predictor
from pipelines.methods import METHODS, training_setting


def address(cell: TrainingJob, data: TrainingData, backbone: BackboneConfig) -> str:
    """Where the head of this cell lies below `cache/heads/`."""
    content = {
        "method": training_setting(cell.method),
        "seed": cell.seed,
        "data": data.address,
        "backbone": dict(backbones.identity(backbone)),
        "code": code_version(cell.method.name, cell.method.head.name),
    }
    if cell.method.needs_outlier_counts and data.outlier_counts is not None:
        content["outlier_counts"] = data.outlier_counts.tolist()
    return digest(content)


# Where the source that decides a head's weights lies.
_DECIDING = ("pipelines.methods", "pipelines.backbones", "pipelines.ood", "pipelines.finetune.loop")


def code_version(method: str, head: str) -> str:
    """A digest of the source that decides what training gives.

    That is the loop, the method, the head, and what they use of the folders named above.
    """
    modules = {m.__name__: m for m in (pipelines.finetune.loop, METHODS[method], HEADS[head])}
    waiting: list[ModuleType] = list(modules.values())
    while waiting:
        for value in vars(waiting.pop()).values():
            used = inspect.getmodule(value)
            name = used.__name__ if used is not None else ""
            if used is not None and name.startswith(_DECIDING) and name not in modules:
                modules[name] = used
                waiting.append(used)
    sources = "\n".join(inspect.getsource(modules[name]) for name in sorted(modules))
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def is_trained(storage: Storage, head: str) -> bool:
    """Whether the head at that address is complete."""
    return storage.exists("cache", "heads", head, "manifest.json")


def read_manifest(storage: Storage, head: str) -> dict[str, Any]:
    """Setting, seed, best epoch and history of a trained head."""
    return dict(storage.read_json("cache", "heads", head, "manifest.json"))


def load_predictor(
    storage: Storage, head: str, which: Literal["best", "last"] = "best"
) -> Predictor:
    """The trained head at that address."""
    folder = ("cache", "heads", head, which)
    names = ("head.json", "head.safetensors")
    return Predictor.from_files({name: storage.read_bytes(*folder, name) for name in names})


def keep(
    head: str, cell: TrainingJob, data: TrainingData, trained: Trained, storage: Storage
) -> None:
    """Write what training gave under its address."""
    folder = ("cache", "heads", head)
    for which, predictor in (("best", trained.predictor), ("last", trained.last)):
        for name, content in predictor.files().items():
            storage.write_bytes(content, *folder, which, name)
    manifest = {
        "method": training_setting(cell.method),
        "seed": cell.seed,
        "data": data.address,
        "best_epoch": trained.best_epoch,
        "history": list(trained.history),
    }
    storage.write_json(manifest, *folder, "manifest.json")
