"""Locks of a storage: what two processes must not do at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from pipelines.data.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "locks"


@contextmanager
def locked(storage: Storage, name: str, waiting: str = "") -> Iterator[None]:
    """Nobody else holds the lock `name` of this storage during the block.

    The system frees a lock when its process ends, however that happens. A storage behind a URI
    has none: what runs there at once does equal work twice, with equal results.

    Args:
        storage: whose lock.
        name: of the lock.
        waiting: is logged where another process holds it.
    """
    if not storage.is_local:
        yield
        return
    path = storage.local(FOLDER, f"{name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting:
            logger.warning("%s", waiting)
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()
