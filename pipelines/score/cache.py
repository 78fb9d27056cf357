"""The cache of fitted scores: each record at the address of what decides it.

cache/fitted/ADDRESS/record.safetensors   the fitted record
cache/fitted/ADDRESS/manifest.json        written last: what went in; a training's history
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pipelines.data.storage import Storage
from pipelines.score import by_name as scoring
from pipelines.score.by_name import Records

FOLDER = ("cache", "fitted")


def is_fitted(storage: Storage, address: str) -> bool:
    """Whether the record at that address is complete."""
    return storage.exists(*FOLDER, address, "manifest.json")


def read_manifest(storage: Storage, address: str) -> dict[str, Any]:
    """What went into a record, and the history of a training."""
    return dict(storage.read_json(*FOLDER, address, "manifest.json"))


@functools.lru_cache(maxsize=16)
def load_record(storage: Storage, name: str, address: str) -> Any:
    """The record of the score `name` at that address, kept in this process."""
    content = storage.read_bytes(*FOLDER, address, "record.safetensors")
    return scoring.from_bytes(name, content)


def load_records(storage: Storage, addresses: Mapping[str, str]) -> Records:
    """Records by the name of their score."""
    return {name: load_record(storage, name, address) for name, address in addresses.items()}
