"""The index of a source: one row an image, and a key that names one image alone.

A key that two rows have would take the labels of both and the pixels of one: such a source is
refused, as is one whose key is missing, empty or cannot be written.
"""

from __future__ import annotations

import posixpath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines.config import UserError
from pipelines.data import files
from pipelines.data.limits import LIMITS, refuse_bytes
from pipelines.data.parquet_files import UNREADABLE, check_size
from pipelines.data.schema import INDEX


def as_index(table: pa.Table, where: str = "the source", *, domain: str | None = None) -> pa.Table:
    """`table` with the columns of INDEX in order, missing ones null, sorted by key.

    Args:
        table: with a column `key` and any of the others.
        where: names the source in messages.
        domain: replaces the column of that name.

    Raises:
        UserError: see `check_keys`.
    """
    index = columns_of_index(table, domain=domain)
    if index.num_rows:  # Arrow's kernels do not survive every column without a row
        check_keys(index["key"], where)
    try:
        index.validate(full=True)
    except pa.ArrowException as error:
        raise UserError(
            f"{where}: a key, class name, domain or split is no text ({error})"
        ) from None
    # Arrow's sort of strings is by bytes, as Python's is by code points: the same in UTF-8.
    return index.take(pc.sort_indices(index["key"]))


def columns_of_index(table: pa.Table, *, domain: str | None = None) -> pa.Table:
    """`table` with the columns of INDEX in order, missing ones null; rows keep their order."""
    columns = []
    for field in INDEX:
        if field.name == "domain" and domain is not None:
            columns.append(pa.array([domain] * table.num_rows, pa.string()))
        elif field.name in table.column_names:
            columns.append(table[field.name].cast(pa.string()))
        else:
            columns.append(pa.nulls(table.num_rows, pa.string()))
    return pa.Table.from_arrays(columns, schema=INDEX)


def check_keys(keys: pa.ChunkedArray | pa.Array, where: str) -> None:
    """Refuse keys that do not name one image each.

    Raises:
        UserError: where a key is missing, empty, holds a NUL byte or stands there twice.
    """
    if not len(keys):  # Arrow's indices_nonzero crashes on a column without chunks
        return
    lengths = pc.fill_null(pc.binary_length(keys), 0)
    missing = pc.indices_nonzero(pc.equal(lengths, 0)).to_pylist()
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(keys)} rows have no key (first: row {missing[0]}); "
            "every image needs a name of its own"
        )
    with_nul = keys.filter(pc.match_substring(keys, "\0")).to_pylist()
    if with_nul:
        raise UserError(f"{where}: {len(with_nul)} keys hold a NUL byte (first: {with_nul[0]!r})")
    refuse_doubled(keys, where)


def refuse_doubled(keys: pa.ChunkedArray | pa.Array, where: str) -> None:
    """Refuse keys of which two are equal.

    Raises:
        UserError: with the first few of them.
    """
    counts = pc.value_counts(keys)
    if len(counts) == len(keys):
        return
    doubled = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    first = ", ".join(sorted(doubled)[:3])
    raise UserError(
        f"{where}: {len(doubled)} keys stand there more than once (first: {first}); a key names "
        "one image, so make them different (by class or file, for example) or leave the doubles out"
    )


def read_index_file(path: str) -> pa.Table:
    """The table of images that a CSV or Parquet file holds, its keys below the source's folder.

    Raises:
        UserError: where it cannot be read or is too large, or a key names no file below the
            folder, or two keys name the same.
    """
    names = [field.name for field in INDEX]
    try:
        with files.open_file(path) as opened:
            if path.endswith(".parquet"):
                with pq.ParquetFile(opened) as stored:
                    has = [name for name in stored.schema_arrow.names if name in names]
                    check_size(stored, has)
                    table = stored.read(columns=has)
            else:
                refuse_bytes(opened.seek(0, 2), LIMITS.table_bytes)
                opened.seek(0)
                strings = {name: pa.string() for name in names}
                options = pyarrow.csv.ConvertOptions(column_types=strings)
                table = pyarrow.csv.read_csv(opened, convert_options=options)
        columns = table.column_names
    except UNREADABLE as error:
        raise UserError(f"{path}: not readable as a table of images ({error})") from None
    if "key" not in columns:
        raise UserError(f"{path}: no column 'key'; it has {', '.join(columns)}")
    if doubled := [name for name in names if columns.count(name) > 1]:
        raise UserError(f"{path}: {len(doubled)} columns stand there twice (first: {doubled[0]})")
    keys = table["key"].cast(pa.string())
    plain = []
    for key in keys.to_pylist():
        check_relative(key or "", path)
        plain.append(posixpath.normpath(key))
    refuse_doubled(pa.array(plain, pa.string()), path)
    return table


def check_relative(key: str, where: str) -> None:
    """Refuse a key that names a file outside its source.

    Raises:
        UserError: for an absolute path, a drive, or a step up (`..`).
    """
    if not files.is_relative(key):
        raise UserError(f"{where}: {key!r} is not a path below the source; nothing outside is read")
