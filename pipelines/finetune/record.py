"""The record of a trained head, as it lies beside the head's files."""

from __future__ import annotations

from pydantic import JsonValue

from pipelines.records import StoredRecord


class HeadRecord(StoredRecord):
    """What a trained head was asked to be, and how its training went.

    Attributes:
        setting: what of the method's settings decides a head (`training_setting`).
        seed: of the training job.
        data: digest of the training data (`TrainingData.address`).
        code: digest of the code that trained it (`pipelines.finetune.cache.head_code`).
        best_epoch: the epoch that validation chose, 1 .. epochs; 0 where nothing was trained.
        history: one report an epoch.
    """

    setting: dict[str, JsonValue]
    seed: int
    data: str
    code: str
    best_epoch: int
    history: tuple[dict[str, float], ...]
