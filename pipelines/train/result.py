"""What the stage train writes: which network each method and seed was given."""

from __future__ import annotations

from pipelines.records import HeadKey, Record, StoredRecord


class NetworkRef(Record):
    """A trained network and its address below `cache/networks/`."""

    key: HeadKey
    address: str


class TrainResult(StoredRecord):
    """The content of `train.json`.

    Attributes:
        networks: of every method that trains one, seed by seed.
    """

    networks: tuple[NetworkRef, ...] = ()
