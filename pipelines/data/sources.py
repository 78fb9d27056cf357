"""Where images come from: an index of keys, and their encoded bytes on demand.

A source is a configuration section and does the work itself (`kind` chooses which), so a YAML
block is all that a new data set needs. Every `root` may be a URI (`s3://`, `gs://`,
`https://`), see `pipelines.data.files`. Keys are relative paths below a folder or in a tar
archive, or the values of a Parquet file's key column.

Fingerprints are made of names, sizes and the times of last change (mtime and ctime in
nanoseconds; the entity tag of a store), not of the content: reading a terabyte before each run
to find that nothing changed costs more than the features it would save. ctime cannot be set by
a program, so a file rewritten with its old size and mtime is still noticed; a copied or touched
file costs one needless pass. It errs to the safe side only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipelines.config import Section, UserError, digest
from pipelines.data import archives, files, images, parquet_files
from pipelines.data.files import REQUESTS
from pipelines.data.index_table import as_index, columns_of_index, read_index_file
from pipelines.data.local_files import MISSING, File, check_inside
from pipelines.data.stored_lists import read_names


class Source(Protocol):
    """Images by key; small enough to pickle, so that workers read their own bytes."""

    def fingerprint(self) -> str:
        """A digest that changes when the set of images or their bytes change."""
        ...

    def index(self) -> pa.Table:
        """One row an image, sorted by key, in `pipelines.data.schema.INDEX`.

        Raises:
            UserError: where a row has no key, or two have the same.
        """
        ...

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """The encoded bytes of each key, or what stopped the reading of that one."""
        ...


class FolderSource(Section):
    """A folder of image files; a key is the path below it, the class the first folder.

    `layout` says it for folders that mean something else: `[split, class_name]` for
    `train/n01440764/1.jpg`; `[]` where they mean nothing. `class_map` names the classes of
    folders that are called otherwise (WordNet ids, numbers); a folder it lacks keeps its name.

    With `table` (CSV or Parquet with a column `key` and any of `class_name`, `domain`, `split`)
    the images are the table's, and the class names too.
    """

    kind: Literal["folder"] = "folder"
    root: str = Field(description="the folder, or its URI")
    table: str | None = Field(None, description="CSV or Parquet file: key, class_name, ...")
    domain: str | None = Field(None, description="the style of all images here")
    layout: list[Literal["class_name", "domain", "split", "-"]] = Field(
        ["class_name"], description="what the folders say, from the top; -: nothing"
    )
    class_map: str | None = Field(
        None, description="FILE#KEY: class names by folder name; of a list, by place (0, 1, ...)"
    )

    def fingerprint(self) -> str:
        """See `Source`; no image is opened."""
        if self.table is None:
            stamps = [file.stamp for file in self._files()]
            return digest(["folder", self.domain, stamps])
        keys = self.index()["key"].to_pylist()
        stamps = [file.stamp for file in files.stats(self.root, keys)]
        table = [file.stamp for file in files.listing(self.table, ("",))]
        return digest(["folder", self.domain, table, stamps])

    def index(self) -> pa.Table:
        """See `Source`.

        Raises:
            UserError: where the folder or the table is missing, holds no image, or names a
                file outside the folder.
        """
        if self.table is None:
            table = self._table([file.name for file in self._files(stamped=False)])
        else:
            table = read_index_file(self.table)
        if not table.num_rows:
            raise UserError(
                f"{self.root}: no image here (looked for {' '.join(images.EXTENSIONS)})"
            )
        return as_index(table, self.table or self.root, domain=self.domain)

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """See `Source`; a store behind a URI is asked for several files at once."""
        if not files.is_uri(self.root):
            return [self._read_one(key) for key in keys]
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(self._read_one, keys))

    def _table(self, keys: Sequence[str]) -> pa.Table:
        """What the folders above each key say."""
        names = {} if self.class_map is None else read_names(self.class_map)
        columns: dict[str, list[str | None]] = {level: [] for level in self.layout}
        for key in keys:
            folders = key.split("/")[:-1]
            for level, folder in itertools.zip_longest(self.layout, folders[: len(self.layout)]):
                known = names.get(folder, folder) if level == "class_name" else folder
                columns[level].append(known)
        columns.pop("-", None)
        arrays = [pa.array(column, pa.string()) for column in (keys, *columns.values())]
        return pa.table(arrays, names=["key", *columns])

    def _read_one(self, key: str) -> bytes | Exception:
        path = files.join(self.root, key)
        try:
            if not files.is_uri(path):
                check_inside(self.root, path)
            return files.read(path)
        except (OSError, ValueError, images.Rejected) as error:
            return error

    def _files(self, *, stamped: bool = True) -> list[File]:
        if not files.is_folder(self.root):
            raise UserError(f"{self.root}: no such folder of images")
        return files.listing(self.root, images.EXTENSIONS, stamped=stamped)


class ParquetSource(Section):
    """Parquet with the encoded bytes of one image a row, in one file or all files of a folder.

    The image column is binary, or a struct with a field `bytes` (Hugging Face). Where there is
    no key column, a key is made of the file's name and the row's number.
    """

    kind: Literal["parquet"] = "parquet"
    root: str = Field(description="a Parquet file, or a folder of them, or its URI")
    image_column: str = Field("image", description="encoded bytes, or a struct with `bytes`")
    key_column: str = Field("key", description="a unique name; may be missing")
    class_column: str = Field("class_name", description="may be missing")
    class_map: str | None = Field(None, description="FILE#KEY: class names by name in that column")
    domain: str | None = Field(None, description="the style of all images, over the column's")

    def fingerprint(self) -> str:
        """See `Source`."""
        columns = [self.image_column, self.key_column, self.class_column, self.domain]
        return digest(["parquet", columns, [file.stamp for file in self._files()]])

    def index(self) -> pa.Table:
        """See `Source`.

        Raises:
            UserError: where there is no Parquet file, or one without the image column.
        """
        table = pa.concat_tables([self._index_of(file) for file in self._files()])
        if self.class_map is not None and "class_name" in table.column_names:
            names = read_names(self.class_map)
            known = [names.get(str(name), name) for name in table["class_name"].to_pylist()]
            place = table.column_names.index("class_name")
            table = table.set_column(place, "class_name", pa.array(known, pa.string()))
        return as_index(table, self.root, domain=self.domain)

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """See `Source`; reads each row group that holds one of the keys once."""
        listed = self._files()
        places = _locations(self, tuple(listed))
        rows = pc.index_in(pa.array(keys, pa.string()), value_set=places["key"])
        slots = np.flatnonzero(rows.is_valid().to_numpy(zero_copy_only=False))
        result: list[bytes | Exception] = [KeyError(key) for key in keys]
        taken = places.take(rows.drop_null())
        number, group, row = (taken[name].to_numpy() for name in ("file", "group", "row"))
        for pair in sorted(set(zip(number.tolist(), group.tolist(), strict=True))):
            here = np.flatnonzero((number == pair[0]) & (group == pair[1]))
            contents = parquet_files.cells(
                listed[pair[0]], pair[1], self.image_column, row[here].tolist()
            )
            for slot, content in zip(slots[here], contents, strict=True):
                result[slot] = content
        return result

    def _index_of(self, file: File) -> pa.Table:
        wanted = {
            "key": self.key_column,
            "class_name": self.class_column,
            "domain": "domain",
            "split": "split",
        }
        with parquet_files.opened(file) as table:
            names = set(table.schema_arrow.names)
            if self.image_column not in names:
                has = ", ".join(sorted(names))
                raise UserError(f"{file.path}: no column {self.image_column!r}; it has {has}")
            wanted = {name: column for name, column in wanted.items() if column in names}
            num_rows = table.metadata.num_rows
        found = parquet_files.text_columns(file, list(wanted.values()))
        columns = {name: found[column] for name, column in wanted.items()}
        if "key" not in columns:
            numbers = [f"{file.name}/{n:09d}" for n in range(num_rows)]
            columns["key"] = pa.chunked_array([pa.array(numbers, pa.string())])
        return columns_of_index(pa.table(columns))

    def _files(self) -> list[File]:
        return _listed(self.root, ".parquet", "Parquet file")


class TarSource(Section):
    """Tar archives in WebDataset layout: `000017.jpg`, `000017.cls`, ... one after the other.

    A key is the archive's name and the member's, `train-0001.tar/000017.jpg`; the class name is
    the content of `000017.cls`, where there is one. Archives are read in place, never unpacked:
    a member that is a link, or whose name leaves the archive, is rejected, and so is what
    follows the place where a broken archive cannot be read any more.
    """

    kind: Literal["tar"] = "tar"
    root: str = Field(description="a tar archive, or a folder of them, or its URI")
    domain: str | None = Field(None, description="the style of all images here")

    def fingerprint(self) -> str:
        """See `Source`."""
        return digest(["tar", self.domain, [file.stamp for file in self._files()]])

    def index(self) -> pa.Table:
        """See `Source`.

        Raises:
            UserError: where there is no archive, or no image in any.
        """
        rows = [
            {"key": f"{file.name}/{member.name}", "class_name": member.class_name}
            for file in self._files()
            for member in archives.members(file)
        ]
        if not rows:
            raise UserError(f"{self.root}: no image in the archives here")
        return as_index(pa.Table.from_pylist(rows), self.root, domain=self.domain)

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """See `Source`; opens each archive once."""
        result: list[bytes | Exception] = [KeyError(key) for key in keys]
        for file in self._files():
            prefix = f"{file.name}/"
            wanted = {key: slot for slot, key in enumerate(keys) if key.startswith(prefix)}
            if wanted:
                members = {prefix + member.name: member for member in archives.members(file)}
                places = {slot: members[key] for key, slot in wanted.items() if key in members}
                for slot, content in archives.read_members(file, places):
                    result[slot] = content
        return result

    def _files(self) -> list[File]:
        return _listed(self.root, ".tar", "tar archive")


AnySource = Annotated[FolderSource | ParquetSource | TarSource, Field(discriminator="kind")]


def open_source(root: str) -> FolderSource | ParquetSource | TarSource:
    """The source that a bare path or URI means: by its ending, or by what the folder holds.

    Raises:
        UserError: where there is nothing at `root`.
    """
    if root.endswith(".parquet"):
        return ParquetSource(root=root)
    if root.endswith(".tar"):
        return TarSource(root=root)
    if not files.is_folder(root):
        raise UserError(f"source={root}: no such folder, Parquet file or tar archive")
    names = [file.name for file in files.listing(root, (".parquet", ".tar"), stamped=False)]
    if any(name.endswith(".parquet") for name in names):
        return ParquetSource(root=root)
    return TarSource(root=root) if names else FolderSource(root=root)


def _listed(root: str, suffix: str, kind: str) -> list[File]:
    """The files of a kind below `root`, each of which has to be there."""
    listed = files.listing(root, (suffix,))
    if not listed:
        raise UserError(f"{root}: no {kind} here")
    for file in listed:
        try:
            if not files.is_uri(root) and file.path != str(files.here(root)):
                check_inside(root, file.path)
        except images.Rejected as error:
            raise UserError(f"{file.path}: {error.message}; give a folder above both") from None
        if file.size == MISSING:
            raise UserError(f"{file.path}: no such file, or a link to nothing")
    return listed


@functools.lru_cache(maxsize=8)
def _locations(source: ParquetSource, listed: tuple[File, ...]) -> pa.Table:
    """Key, file, row group and row within it; a changed file makes a new entry."""
    parts = []
    for number, file in enumerate(listed):
        index = source._index_of(file)
        with parquet_files.opened(file) as table:
            metadata = table.metadata
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        columns = {
            "key": index["key"],
            "file": pa.array(np.full(index.num_rows, number)),
            "group": pa.array(np.repeat(np.arange(len(sizes)), sizes)),
            "row": pa.array(np.concatenate([np.arange(n) for n in sizes] or [np.arange(0)])),
        }
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)
