"""What the embed stage writes: where the features of a benchmark's sources lie."""

from __future__ import annotations

from pipelines.records import HeadKey, Record, StoredRecord


class Rejection(Record):
    """An image without a feature: its key, the kind of defect, and a sentence."""

    key: str
    reason: str
    message: str


class EmbeddedSource(Record):
    """The features of one source: their address, how many, and the images without one.

    `views` is the address of the features of its training images' augmented views.
    """

    address: str
    rows: int
    views: str | None = None
    rejected: tuple[Rejection, ...] = ()


class SharedImages(Record):
    """Images that count twice: in two sets (or in one), which is allowed and has to be said.

    Attributes:
        sets: the two, or one twice.
        images: how many.
        first: a sentence that names one of them.
    """

    sets: tuple[str, str]
    images: int
    first: str


class NetworkFeatures(Record):
    """The features that one trained network gives of the benchmark's sources, by name."""

    key: HeadKey
    sources: dict[str, EmbeddedSource]


class EmbedResult(StoredRecord):
    """The content of `embed.json`.

    Attributes:
        benchmark: its name.
        backbone: what of the backbone decides a feature's value (`pipelines.backbones.clip`).
        sources: by name.
        shared: images that count twice, by pairs of sets.
        networks: the features of each network that a method trained, in the order of `train.json`.
    """

    benchmark: str
    backbone: dict[str, str]
    sources: dict[str, EmbeddedSource]
    shared: tuple[SharedImages, ...] = ()
    networks: tuple[NetworkFeatures, ...] = ()
