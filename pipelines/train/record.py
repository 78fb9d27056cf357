"""The record of a trained network, as it lies beside its weights."""

from __future__ import annotations

from pydantic import JsonValue

from pipelines.records import StoredRecord


class NetworkRecord(StoredRecord):
    """What a trained network was asked to be, and how its training went.

    Attributes:
        setting: what of the method's settings decides a network (`network_setting`).
        seed: of the training job.
        data: digest of the training data (`NetworkData.address`).
        code: digest of the code that trained it.
        class_names: the rows of its last layer.
        history: one report an epoch.
    """

    setting: dict[str, JsonValue]
    seed: int
    data: str
    code: str
    class_names: tuple[str, ...]
    history: tuple[dict[str, float], ...]
