"""Who is at work in a storage, and what those left who ended before their work was done.

storage/leases/PID-RANDOM.json      a process that is at work; it goes when the work is done
storage/leases/*.json.ended         one that stopped with an error: its leftovers may go at once

Temporary files carry no owner. Those older than every lease that is held belong to nobody who is
at work; the file system's own clock compares them, so machines may disagree on the time.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.store.locks import locked
from pipelines.store.processes import Process, remove_temporary_folders, this_process

FOLDER = "leases"
ENDED = ".ended"
# What `Storage.writing` writes to before a file takes its name.
TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp$")


@contextmanager
def at_work(storage: Storage, close_others: Callable[[], None] = lambda: None) -> Iterator[None]:
    """This process works in `storage`; first, what ended ones left there is removed.

    Args:
        storage: where. One behind a URI keeps no leases, and no file is removed there: an object
            store shows an object whole or not at all.
        close_others: closes what ended processes left outside of the files; called where one did,
            or where no lease can tell.

    Raises:
        UserError: where the storage is no folder.
    """
    if not storage.is_local:
        close_others()
        yield
        return
    _refuse_a_file(storage)
    name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
    lease = storage.local(FOLDER, name)
    storage.write_bytes(this_process().to_json(), FOLDER, name)
    is_done = False
    try:
        _sweep(storage, close_others)
        yield
        is_done = True
    finally:
        if is_done:
            lease.unlink(missing_ok=True)
        else:
            with suppress(OSError):  # what ended the work is what is to be said
                lease.rename(f"{lease}{ENDED}")


def _refuse_a_file(storage: Storage) -> None:
    root = storage.local()
    if root.exists() and not root.is_dir():
        raise UserError(f"storage={root}: a file; give a folder, storage=FOLDER")


def _sweep(storage: Storage, close_others: Callable[[], None]) -> None:
    """Remove what ended processes left; nothing where none did."""
    if not any(_is_gone(path) for path in storage.local(FOLDER).iterdir()):
        return
    with locked(storage, "leases"):
        leases = sorted(storage.local(FOLDER).glob("*.json*"))
        gone = [path for path in leases if _is_gone(path)]
        held = [path for path in leases if path not in gone]
        before = min((time for path in held if (time := _time(path))), default=0)
        _remove_temporary_files(storage.local(), before)
        _remove_old_folders(storage.local("cache", "ray_train"), before)
        remove_temporary_folders()
        close_others()
        for path in gone:
            path.unlink(missing_ok=True)


def _is_gone(lease: Path) -> bool:
    """Whether whoever held a lease is no longer at work; one that cannot be read is held."""
    if lease.name.endswith(ENDED):
        return True
    try:
        return Process.from_json(lease.read_bytes(), str(lease)).is_gone
    except (OSError, UserError):
        return False


def _remove_temporary_files(root: Path, before: int) -> None:
    for folder, names, files in os.walk(root):
        if Path(folder) == root and "artifacts" in names:
            names.remove("artifacts")  # MLflow's: many, and never ours half written
        for name in files:
            path = Path(folder, name)
            if TEMPORARY.match(name) and _time(path) < before:
                path.unlink(missing_ok=True)


def _remove_old_folders(parent: Path, before: int) -> None:
    """Remove what Ray Train kept of its runs; the state of a training lies with its head."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if path.is_dir() and _newest(path) < before:
            shutil.rmtree(path, ignore_errors=True)


def _newest(folder: Path) -> int:
    """When something in a folder was last written."""
    return max(_time(path) for path in (folder, *folder.rglob("*")))


def _time(path: Path) -> int:
    """When a file was written; 0 where it is gone by now."""
    try:
        return path.lstat().st_mtime_ns
    except FileNotFoundError:
        return 0
