"""The command for a storage that was moved or copied: `python -m jobs.move storage=FOLDER`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipelines.config import Section
from pipelines.data.storage import Storage
from pipelines.store import database
from pipelines.store.errors import said_clearly


class MoveConfig(Section):
    """Which storage was moved."""

    storage: str = Field("./outputs", description="the folder, where it lies now")


def run(config: MoveConfig) -> tuple[Path, int]:
    """Mend the storage; the folder that it pointed to, and the number of paths rewritten."""
    storage = Storage.open(config.storage)
    with said_clearly(storage):
        return database.move(storage)
