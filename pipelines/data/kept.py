"""One reader for everything that is kept: what was written is what is read, or it is `Damaged`.

A seal is a digest of a content together with its place, the path below the storage. So a flipped
byte, a file that was cut and one that was swapped with another of its kind are all seen, and a
storage that was moved as a whole stays true. Four things have one:

- a record (JSON): under the key `sealed`, which may also hold size and digest of further files;
- a table (Parquet): in the metadata of the file, which anyone can read as before;
- a file of any bytes (a checkpoint): in a line before them;
- an `Entry`, a folder of files: in the record that names them all and is written last.

Readers raise `Damaged`. What can be made again is looked for with `find...`: what is damaged is
removed, which one line says, and counts as missing. `pipelines.pipeline` does the same with what
turns out damaged while a stage reads it, and goes again through the stages.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.records import Record, StoredRecord

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SEALED = "sealed"
_NOT_AS_WRITTEN = "not the bytes that were written here"

Parts: TypeAlias = tuple[str, ...]
RecordT = TypeVar("RecordT", bound=StoredRecord)


class Damaged(UserError):
    """Something that is kept is not as it was written.

    Attributes:
        place: its path.
        why: what is wrong with it.
        bad: what has to go so that it is made again, below the storage.
    """

    def __init__(self, place: str, why: str, bad: Sequence[Parts] = ()) -> None:
        """Say what is damaged and what makes it anew."""
        super().__init__(
            f"{place}: {why}; run python -m jobs.pipeline with the same words: it is made again"
        )
        self.place = place
        self.why = why
        self.bad = tuple(bad)

    def __reduce__(self) -> tuple[type[Damaged], tuple[str, str, tuple[Parts, ...]]]:
        """How it passes from one process to another."""
        return type(self), (self.place, self.why, self.bad)


class FileSeal(Record):
    """Size and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> FileSeal:
        """The seal of a file with that content."""
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> FileSeal:
        """The seal of a file of this machine, whatever its size."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return cls(size=path.stat().st_size, sha256=digest.hexdigest())


def discard(storage: Storage, damaged: Damaged) -> None:
    """Remove what is damaged, so that it is missing, and say so in one line."""
    for parts in damaged.bad:
        storage.remove(*parts)
    log.warning("%s: %s; it is removed and made again", damaged.place, damaged.why)


def write_record(
    storage: Storage,
    record: StoredRecord,
    *parts: str,
    files: Mapping[str, FileSeal] | None = None,
) -> None:
    """Write a sealed record.

    Args:
        storage: where it goes.
        record: the content.
        parts: of its path.
        files: the seals of the files that it vouches for, by their paths beside it.
    """
    data = json.loads(record.to_json())
    sealed: dict[str, Any] = {}
    if files:
        sealed["files"] = {name: seal.model_dump() for name, seal in files.items()}
    data[SEALED] = sealed
    data[SEALED] = {**sealed, "digest": _digest_of_record(parts, data)}
    storage.write_json(data, *parts)


def read_record(storage: Storage, kind: type[RecordT], *parts: str) -> RecordT:
    """The record that `write_record` wrote there.

    Raises:
        Damaged: where it is missing, changed, from another place or of another layout.
    """
    return _read_record(storage, kind, parts)[0]


def find_record(storage: Storage, kind: type[RecordT], *parts: str) -> RecordT | None:
    """The record that is there, if there is one; a damaged one is removed."""
    try:
        return read_record(storage, kind, *parts) if storage.exists(*parts) else None
    except Damaged as damaged:
        discard(storage, damaged)
        return None


def write_table(storage: Storage, table: pa.Table, *parts: str, replace: bool = True) -> None:
    """Write a sealed Parquet file; with `replace=False` one that is there stays."""
    metadata = {**(table.schema.metadata or {}), SEALED.encode(): _digest_of_table(parts, table)}
    with storage.writing(*parts, replace=replace) as path:
        pq.write_table(table.replace_schema_metadata(metadata), path)


def read_table(storage: Storage, *parts: str) -> pa.Table:
    """The table that `write_table` wrote there.

    Raises:
        Damaged: where it is missing, changed, or from another place.
    """
    return open_table(storage, read_bytes(storage, *parts), *parts)


def open_table(storage: Storage, content: bytes, *parts: str) -> pa.Table:
    """The table in the bytes of a file that lies there; raises what `read_table` raises."""
    damaged = functools.partial(Damaged, storage.path(*parts), bad=(parts,))
    try:
        # Strings that are no UTF-8 show only when they are looked at.
        table = pq.read_table(io.BytesIO(content))
        sealed = (table.schema.metadata or {}).get(SEALED.encode())
        is_whole = sealed == _digest_of_table(parts, table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(why=f"not readable ({_line(error)})") from None
    if not is_whole:
        raise damaged(why=_NOT_AS_WRITTEN)
    return table


def find_table(storage: Storage, *parts: str) -> pa.Table | None:
    """The table that is there, if there is one; a damaged one is removed."""
    try:
        return read_table(storage, *parts) if storage.exists(*parts) else None
    except Damaged as damaged:
        discard(storage, damaged)
        return None


def write_file(storage: Storage, content: bytes, *parts: str) -> None:
    """Write bytes after a line that seals them: for what no one else reads."""
    storage.write_bytes(_digest(parts, content) + b"\n" + content, *parts)


def read_file(storage: Storage, *parts: str) -> bytes:
    """The bytes that `write_file` was given.

    Raises:
        Damaged: where the file is missing, changed, or from another place.
    """
    seal, _, content = read_bytes(storage, *parts).partition(b"\n")
    if seal != _digest(parts, content):
        raise Damaged(storage.path(*parts), _NOT_AS_WRITTEN, [parts])
    return content


def find_file(storage: Storage, *parts: str) -> bytes | None:
    """The bytes that `write_file` was given, if the file is there; a damaged one is removed."""
    try:
        return read_file(storage, *parts) if storage.exists(*parts) else None
    except Damaged as damaged:
        discard(storage, damaged)
        return None


def read_bytes(storage: Storage, *parts: str) -> bytes:
    """The bytes of a file that has to be there, as they are.

    Raises:
        Damaged: where it is missing.
    """
    try:
        return storage.read_bytes(*parts)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(storage.path(*parts), "missing", [parts]) from None


@dataclass(frozen=True)
class Entry(Generic[RecordT]):
    """A folder of files that its sealed record publishes: without that it is unfinished work.

    Attributes:
        storage: which holds it.
        folder: the parts of its path.
        kind: of its record.
        name: of the record's file.
    """

    storage: Storage
    folder: Parts
    kind: type[RecordT]
    name: str = field(default=MANIFEST)

    @property
    def place(self) -> Parts:
        """The parts of the record's path."""
        return (*self.folder, self.name)

    def exists(self) -> bool:
        """Whether it was published; says nothing of its files."""
        return self.storage.exists(*self.place)

    def write(
        self,
        record: RecordT,
        files: Mapping[str, bytes] | None = None,
        *,
        there: Mapping[str, FileSeal] | None = None,
    ) -> None:
        """Write the files and then the record.

        Args:
            record: what the folder holds.
            files: contents by their paths in the folder.
            there: the seals of files that lie there already.
        """
        seals = dict(there or {})
        for name, content in (files or {}).items():
            self.storage.write_bytes(content, *self.folder, *name.split("/"))
            seals[name] = FileSeal.of(content)
        write_record(self.storage, record, *self.place, files=seals)

    def read(self) -> RecordT:
        """The record.

        Raises:
            Damaged: where it is missing or not as it was written.
        """
        return self._open()[0]

    def read_all(self, names: Sequence[str]) -> tuple[RecordT, dict[str, bytes]]:
        """The record, and the contents of these files by name.

        Raises:
            Damaged: where one of them is missing or not as it was written.
        """
        record, seals = self._open()
        return record, {name: self.verified(name, seals.get(name)) for name in names}

    def verified(self, name: str, seal: FileSeal | None) -> bytes:
        """The content of one of its files, which has that seal; raises what `read_all` raises."""
        parts = (*self.folder, *name.split("/"))
        try:
            content = self.storage.read_bytes(*parts)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._damaged(name, "missing") from None
        if seal is None or FileSeal.of(content) != seal:
            raise self._damaged(name, _NOT_AS_WRITTEN)
        return content

    def check(self) -> RecordT:
        """The record, once every file is found to be as it was written; holds none in memory.

        Raises:
            Damaged: where one of them is missing or not as it was written.
        """
        record, seals = self._open()
        for name, seal in seals.items():
            try:
                size, sha256 = self.storage.size_and_sha256(*self.folder, *name.split("/"))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise self._damaged(name, "missing") from None
            if (size, sha256) != (seal.size, seal.sha256):
                raise self._damaged(name, _NOT_AS_WRITTEN)
        return record

    def find(self) -> RecordT | None:
        """The record, where the entry is whole; what of it is damaged is removed."""
        try:
            return self.check() if self.exists() else None
        except Damaged as damaged:
            discard(self.storage, damaged)
            return None

    def lost(self) -> list[str]:
        """The paths of what is not there any more, the record's among them; reads no file."""
        try:
            seals = self._open()[1]
        except Damaged as damaged:
            return [damaged.place]
        folders = {tuple(name.split("/")[:-1]) for name in seals}
        there = {
            "/".join((*below, name))
            for below in folders
            for name in self.storage.names(*self.folder, *below)
        }
        return [self.storage.path(*self.folder, name) for name in seals if name not in there]

    def _open(self) -> tuple[RecordT, dict[str, FileSeal]]:
        return _read_record(self.storage, self.kind, self.place)

    def _damaged(self, name: str, why: str) -> Damaged:
        parts = (*self.folder, *name.split("/"))
        return Damaged(self.storage.path(*parts), why, [parts, self.place])


def _read_record(
    storage: Storage, kind: type[RecordT], parts: Parts
) -> tuple[RecordT, dict[str, FileSeal]]:
    content = read_bytes(storage, *parts)
    damaged = functools.partial(Damaged, storage.path(*parts), bad=(parts,))
    try:
        data = json.loads(content)
        sealed = dict(data[SEALED])
        digest = sealed.pop("digest")
        is_whole = digest == _digest_of_record(parts, {**data, SEALED: sealed})
        files = {name: FileSeal(**seal) for name, seal in sealed.get("files", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"not a sealed record ({type(error).__name__}: {_line(error)})"
        raise damaged(why=why) from None
    if not is_whole:
        raise damaged(why=_NOT_AS_WRITTEN)
    del data[SEALED]
    try:
        return kind.model_validate_json(json.dumps(data)), files
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        why = f"not a {kind.__name__} of this version ({where}: {first['msg']})"
        raise damaged(why=why) from None


def _digest(parts: Parts, content: bytes) -> bytes:
    """The seal of a content at a place."""
    sha = hashlib.sha256(json.dumps(list(parts)).encode() + b"\n")
    sha.update(content)
    return sha.hexdigest().encode()


def _digest_of_record(parts: Parts, data: Mapping[str, object]) -> str:
    return _digest(parts, json.dumps(data, sort_keys=True).encode()).decode()


def _digest_of_table(parts: Parts, table: pa.Table) -> bytes:
    """The seal of a table: of its metadata and of its columns, value by value."""
    sha = hashlib.sha256()
    metadata = {k: v for k, v in (table.schema.metadata or {}).items() if k != SEALED.encode()}
    sha.update(repr([sorted(metadata.items()), table.column_names, table.num_rows]).encode())
    for column in table.columns:
        _feed(sha, column.combine_chunks())
    return _digest(parts, sha.digest())


def _feed(sha: Any, values: pa.Array) -> None:
    """Add an array's values to a digest."""
    kind = values.type
    if pa.types.is_fixed_size_list(kind):
        _feed(sha, values.flatten())
    elif (pa.types.is_floating(kind) or pa.types.is_integer(kind)) and not values.null_count:
        sha.update(values.to_numpy(zero_copy_only=False).tobytes())
    else:
        for value in values.to_pylist():
            sha.update(repr(value).encode())
            sha.update(b"\0")


def _line(error: Exception) -> str:
    """An error's message on one short line."""
    return " ".join(str(error).split())[:120]
