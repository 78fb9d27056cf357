"""A trained head in the cache, without a training."""

from __future__ import annotations

from pipelines.data.storage import Storage
from pipelines.finetune.cache import entry
from pipelines.finetune.record import HeadRecord
from pipelines.heads import Predictor


def publish_head(storage: Storage, address: str, head: Predictor) -> None:
    record = HeadRecord(setting={}, seed=0, data="", code="", best_epoch=0, history=())
    files = {f"best/{name}": content for name, content in head.files().items()}
    entry(storage, address).write(record, files)
