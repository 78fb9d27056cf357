"""Where images come from: an index of keys, and their encoded bytes on demand.

A source is a configuration section and does the work itself (`kind` chooses which), so a YAML
block is all that a new data set needs. Keys are relative paths below a folder, or the values
of a Parquet file's key column.

Fingerprints are made of names, sizes and the times of last change (mtime and ctime, in
nanoseconds), not of the content: reading a terabyte before each run to find that nothing
changed costs more than the features it would save. ctime cannot be set by a program, so a file
rewritten with its old size and mtime is still noticed; a copied or touched file costs one
needless pass. It errs to the safe side only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.config import Section, UserError, digest
from pipelines.data import images
from pipelines.data.schema import INDEX


class Source(Protocol):
    """Images by key; small enough to pickle, so that workers read their own bytes."""

    def fingerprint(self) -> str:
        """A digest that changes when the set of images or their bytes change."""
        ...

    def index(self) -> pa.Table:
        """One row an image, sorted by key, in `pipelines.data.schema.INDEX`.

        A key may stand there twice; `embed` keeps the first and rejects the others.
        """
        ...

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """The encoded bytes of each key, or what stopped the reading of that one."""
        ...


class FolderSource(Section):
    """A folder of image files; a key is the path below it, the class the first folder.

    With `table` (CSV or Parquet with a column `key` and any of `class_name`, `domain`, `split`)
    the images are the table's, and the class names too.
    """

    kind: Literal["folder"] = "folder"
    root: str = Field(description="the folder")
    table: str | None = Field(None, description="CSV or Parquet file: key, class_name, ...")
    domain: str | None = Field(None, description="the style of all images here")

    def fingerprint(self) -> str:
        """See `Source`; a walk over the folder without opening an image."""
        if self.table is None:
            return digest(["folder", self.domain, [_stamp(p, k) for k, p in self._files()]])
        keys = self.index()["key"].to_pylist()
        stamps = [_stamp(self._path(key), key) for key in keys]
        return digest(["folder", self.domain, _stamp(Path(self.table), "table"), stamps])

    def index(self) -> pa.Table:
        """See `Source`.

        Raises:
            UserError: where the folder or the table is missing, holds no image, or names a
                file outside the folder.
        """
        if self.table is None:
            keys = [key for key, _ in self._files()]
            rows = {"key": keys, "class_name": [_top_folder(key) for key in keys]}
            table = pa.table(rows, schema=pa.schema([INDEX.field(0), INDEX.field(1)]))
        else:
            table = _read_index_file(Path(self.table))
            for key in table["key"].to_pylist():
                check_relative(key, self.table)
        if not table.num_rows:
            raise UserError(
                f"{self.root}: no image here (looked for {' '.join(images.EXTENSIONS)})"
            )
        return as_index(table, domain=self.domain)

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """See `Source`."""
        return [self._read_one(key) for key in keys]

    def _read_one(self, key: str) -> bytes | Exception:
        try:
            return self._path(key).read_bytes()
        except OSError as error:
            return error

    def _path(self, key: str) -> Path:
        return Path(self.root).expanduser() / key

    def _files(self) -> list[tuple[str, Path]]:
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{self.root}: no such folder of images")
        found = []
        for folder, folders, names in os.walk(root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if not name.startswith(".") and name.lower().endswith(images.EXTENSIONS):
                    path = Path(folder, name)
                    found.append((path.relative_to(root).as_posix(), path))
        return sorted(found)


class ParquetSource(Section):
    """Parquet with the encoded bytes of one image a row, in one file or all files of a folder.

    The image column is binary, or a struct with a field `bytes` (Hugging Face). Where there is
    no key column, a key is made of the file's name and the row's number.
    """

    kind: Literal["parquet"] = "parquet"
    root: str = Field(description="a Parquet file, or a folder of them")
    image_column: str = Field("image", description="encoded bytes, or a struct with `bytes`")
    key_column: str = Field("key", description="a unique name; may be missing")
    class_column: str = Field("class_name", description="may be missing")
    domain: str | None = Field(None, description="the style of all images, over the column's")

    def fingerprint(self) -> str:
        """See `Source`."""
        columns = [self.image_column, self.key_column, self.class_column, self.domain]
        return digest(["parquet", columns, [_stamp(p, p.name) for p in self._files()]])

    def index(self) -> pa.Table:
        """See `Source`.

        Raises:
            UserError: where there is no Parquet file, or one without the image column.
        """
        parts = [self._index_of(path) for path in self._files()]
        return as_index(pa.concat_tables(parts), domain=self.domain)

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """See `Source`; reads each row group that holds one of the keys once."""
        files = self._files()
        stamps = tuple(_stamp(path, str(path)) for path in files)
        table = _locations(self, stamps)
        rows = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"])
        found = rows.fill_null(-1).to_numpy()
        result: list[bytes | Exception] = [KeyError(key) for key in keys]
        places = table.select(["file", "group", "row"]).take(pa.array(found[found >= 0]))
        slots = np.flatnonzero(found >= 0)
        columns = [places[name].to_numpy() for name in ("file", "group", "row")]
        for file, group in sorted(set(zip(*columns[:2], strict=True))):
            here = np.flatnonzero((columns[0] == file) & (columns[1] == group))
            contents = self._read_rows(files[file], int(group), columns[2][here])
            for slot, content in zip(slots[here], contents, strict=True):
                result[slot] = content
        return result

    def _read_rows(self, path: Path, group: int, rows: Iterable[int]) -> list[bytes | Exception]:
        try:
            with pq.ParquetFile(path) as file:
                column = file.read_row_group(group, columns=[self.image_column])
            taken = column[self.image_column].take(pa.array(rows))
            if pa.types.is_struct(taken.type):
                taken = pc.struct_field(taken, "bytes")
            return [content or b"" for content in taken.to_pylist()]
        except (OSError, pa.ArrowException) as error:
            return [error for _ in rows]

    def _index_of(self, path: Path) -> pa.Table:
        with _parquet(path) as file:
            names = set(file.schema_arrow.names)
            if self.image_column not in names:
                raise UserError(
                    f"{path}: no column {self.image_column!r}; it has {', '.join(sorted(names))}"
                )
            wanted = {
                "key": self.key_column,
                "class_name": self.class_column,
                "domain": "domain",
                "split": "split",
            }
            wanted = {name: column for name, column in wanted.items() if column in names}
            table = file.read(columns=list(wanted.values()))
            columns = {name: table[column].cast(pa.string()) for name, column in wanted.items()}
            if "key" not in columns:
                numbers = range(file.metadata.num_rows)
                columns["key"] = pa.array([f"{path.name}/{n:09d}" for n in numbers], pa.string())
        return as_index(pa.table(columns), sort=False)

    def _files(self) -> list[Path]:
        root = Path(self.root).expanduser()
        files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
        if not files or not files[0].is_file():
            raise UserError(f"{self.root}: no Parquet file here")
        return files


AnySource = Annotated[FolderSource | ParquetSource, Field(discriminator="kind")]


def open_source(root: str) -> FolderSource | ParquetSource:
    """The source that a bare path means: a Parquet file, or a folder of either.

    Raises:
        UserError: where there is nothing at `root`.
    """
    path = Path(root).expanduser()
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return ParquetSource(root=root)
    if not path.is_dir():
        raise UserError(f"source={root}: no such folder or Parquet file")
    return FolderSource(root=root)


def as_index(table: pa.Table, *, domain: str | None = None, sort: bool = True) -> pa.Table:
    """`table` with the columns of INDEX in order, missing ones null, sorted by key.

    Rows of equal keys keep their order. `domain` replaces the column of that name.
    """
    columns = []
    for field in INDEX:
        if field.name == "domain" and domain is not None:
            columns.append(pa.array([domain] * table.num_rows, pa.string()))
        elif field.name in table.column_names:
            columns.append(table[field.name].cast(pa.string()))
        else:
            columns.append(pa.nulls(table.num_rows, pa.string()))
    index = pa.Table.from_arrays(columns, schema=INDEX)
    if not sort:
        return index
    # Arrow's sort of strings is by bytes, as Python's is by code points: the same in UTF-8.
    return index.take(pc.sort_indices(index["key"]))


def check_relative(key: str, where: str) -> None:
    """Refuse a key that names a file outside its source.

    Raises:
        UserError: for an absolute path, a drive, or a step up (`..`).
    """
    path = PurePosixPath(key.replace("\\", "/"))
    if not key or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise UserError(f"{where}: {key!r} is not a path below the source; nothing outside is read")


def _top_folder(key: str) -> str | None:
    first, slash, _ = key.partition("/")
    return first if slash else None


def _stamp(path: Path, name: str) -> tuple[str, int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return name, -1, -1, -1  # read() will say what is wrong with it
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _read_index_file(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            strings = {field.name: pa.string() for field in INDEX}
            options = pyarrow.csv.ConvertOptions(column_types=strings)
            table = pyarrow.csv.read_csv(path, convert_options=options)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not readable as a table of images ({error})") from None
    if "key" not in table.column_names:
        raise UserError(f"{path}: no column 'key'; it has {', '.join(table.column_names)}")
    return table


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not readable as Parquet ({error})") from None


@functools.lru_cache(maxsize=8)
def _locations(source: ParquetSource, stamps: tuple[object, ...]) -> pa.Table:  # noqa: ARG001
    """Key, file, row group and row within it; `stamps` makes a changed file a new entry."""
    parts = []
    for number, path in enumerate(source._files()):
        index = source._index_of(path)
        with _parquet(path) as file:
            sizes = [
                file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)
            ]
        columns = {
            "key": index["key"],
            "file": pa.array(np.full(index.num_rows, number)),
            "group": pa.array(np.repeat(np.arange(len(sizes)), sizes)),
            "row": pa.array(np.concatenate([np.arange(n) for n in sizes] or [np.arange(0)])),
        }
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)
