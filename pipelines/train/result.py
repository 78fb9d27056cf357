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
        outlier_counts: outliers that the network takes for each class before training, where
            a method asks for them.
    """

    networks: tuple[NetworkRef, ...] = ()
    outlier_counts: tuple[int, ...] | None = None
