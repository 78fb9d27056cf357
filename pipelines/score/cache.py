"""The cache of fitted scores: each record at the address of what decides it.

cache/fitted/ADDRESS/record.safetensors   the fitted record
cache/fitted/ADDRESS/manifest.json        written last: what went in, the record's seal; a
                                          training's history
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from pydantic import Field, JsonValue

from pipelines.data.kept import Entry
from pipelines.data.storage import Storage
from pipelines.records import StoredRecord
from pipelines.score import by_name as scoring
from pipelines.score.by_name import Fitted, Records

FOLDER = ("cache", "fitted")
FILE = "record.safetensors"


class FittedManifest(StoredRecord):
    """The content of `manifest.json`: what a record was fitted with.

    Attributes:
        score: its name; params: of the score; seed: of a training.
        seconds: that fitting took.
        settings: of a training, with every value that the features decided.
        history: of a training, the figures of each epoch by name.
        candidates: of mined words, how many there were to choose from.
        words: that were mined, the farthest from the classes first.
    """

    score: str
    params: dict[str, int | float] = Field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    history: tuple[dict[str, float], ...] = ()
    candidates: int = 0
    words: tuple[str, ...] = ()


def entry(storage: Storage, address: str) -> Entry[FittedManifest]:
    """The folder of the record at that address."""
    return Entry(storage, (*FOLDER, address), FittedManifest)


def is_fitted(storage: Storage, address: str) -> bool:
    """Whether the record at that address is complete; what of it is damaged is removed."""
    return entry(storage, address).find() is not None


def write(storage: Storage, address: str, record: Fitted, manifest: FittedManifest) -> None:
    """Keep a record, and then its manifest, which makes it complete."""
    entry(storage, address).write(manifest, {FILE: scoring.to_bytes(record)})


def read_manifest(storage: Storage, address: str) -> FittedManifest:
    """What a record was fitted with, and the history of a training.

    Raises:
        Damaged: where it is not as it was written.
    """
    return entry(storage, address).read()


@functools.lru_cache(maxsize=16)
def load_record(storage: Storage, name: str, address: str) -> Fitted:
    """The record of the score `name` at that address, kept in this process.

    Raises:
        Damaged: where it is not as it was written.
    """
    _, files = entry(storage, address).read_all([FILE])
    return scoring.from_bytes(name, files[FILE])


def load_records(storage: Storage, addresses: Mapping[str, str]) -> Records:
    """Records by the name of their score."""
    return {name: load_record(storage, name, address) for name, address in addresses.items()}
