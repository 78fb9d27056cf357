"""The MLflow database of a storage, read directly: what has to be known before MLflow is imported.

MLflow keeps full paths in it. Where they are not those of the storage, the storage was moved or
copied: it is refused, since MLflow would write into the folder that it was made in, and `move`
mends it.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.store.locks import locked

FILE = "mlflow.db"
ARTIFACTS = "artifacts"
# Where MLflow 3.17 keeps full paths.
_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_DELETED = "Deleted_Internal"


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the model registry, as it is there now.

    Attributes:
        version: its number.
        is_ready: whether the registry says that it can be used.
        location: URI of its files.
        tags: what is known of it.
    """

    version: str
    is_ready: bool
    location: str
    tags: dict[str, str]

    @property
    def folder(self) -> Path | None:
        """Its files, where they lie on this machine."""
        return local_path(self.location)


def local_path(uri: str) -> Path | None:
    """The path of a file URI; None for another one."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(url2pathname(parts.path)) if parts.scheme else Path(uri)


def exists(storage: Storage) -> bool:
    """Whether the storage has a database."""
    return storage.is_local and storage.local(FILE).exists()


def refuse_moved(storage: Storage) -> None:
    """Refuse a storage whose database belongs to another folder, or is damaged.

    Raises:
        UserError: with the command that mends it.
    """
    if not exists(storage):
        return
    made_at = _made_at(storage)
    here = storage.local()
    if made_at is None or made_at == here or (made_at.exists() and made_at.samefile(here)):
        return
    raise UserError(
        f"storage={here}: made at {made_at} and moved or copied, and its MLflow store still writes "
        f"there; mend it: python -m jobs.move {shlex.quote(f'storage={here}')}"
    )


def move(storage: Storage) -> tuple[Path, int]:
    """Let the database point to the folder that it lies in now, in one transaction.

    Returns:
        The folder that it pointed to, and the number of paths that were rewritten.

    Raises:
        UserError: where there is no database.
    """
    if not exists(storage):
        raise UserError(f"storage={storage.root}: no {FILE} there, nothing to mend")
    with locked(storage, "mlflow"):
        made_at, here = _made_at(storage), storage.local()
        if made_at is None or made_at == here:
            return here, 0
        old, new = made_at.as_uri(), here.as_uri()
        with _open(storage) as database, database:
            count = 0
            for table, column in _PATHS:
                done = database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
                count += done.rowcount
        return made_at, count


def version_of(storage: Storage, name: str, which: str) -> RegisteredVersion | None:
    """A version of a registered model, by `@ALIAS` or its number; None where there is none."""
    if not exists(storage):
        return None
    with _open(storage) as database:
        number: object = which
        if which.startswith("@"):
            aliased = database.execute(
                "SELECT version FROM registered_model_aliases WHERE name = ? AND alias = ?",
                (name, which.removeprefix("@")),
            ).fetchone()
            number = aliased and aliased[0]
        found = database.execute(
            "SELECT version, status, coalesce(storage_location, source) FROM model_versions "
            "WHERE name = ? AND CAST(version AS TEXT) = CAST(? AS TEXT) AND current_stage != ?",
            (name, number, _DELETED),
        ).fetchone()
        if found is None:
            return None
        version, status, location = found
        tags = database.execute(
            "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?",
            (name, version),
        ).fetchall()
    return RegisteredVersion(str(version), status == "READY", str(location), dict(tags))


def _made_at(storage: Storage) -> Path | None:
    """The folder whose `artifacts` the experiments write to; None before there is one."""
    with _open(storage) as database:
        found = database.execute("SELECT artifact_location FROM experiments").fetchall()
    for (location,) in found:
        path = local_path(str(location))
        if path is not None and path.name == ARTIFACTS:
            return path.parent
    return None


@contextmanager
def _open(storage: Storage) -> Iterator[sqlite3.Connection]:
    """The database; an error of it as one line.

    Opened for writing, since a transaction that was cut short is undone by whoever opens next.
    """
    path = storage.local(FILE)
    try:
        with closing(
            sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=20.0)
        ) as database:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            yield database
    except sqlite3.DatabaseError as error:
        why = " ".join(str(error).split())
        advice = (
            "make it readable and writable; the same command goes on from here"
            if "unable to open" in why
            else "put a copy of it back, or move it away: the same command then makes it anew"
        )
        raise UserError(f"{path}: the MLflow database cannot be used ({why}); {advice}") from None
