"""Parquet files of images: columns of text, and cells of encoded bytes, within `Limits`.

A compressed file of some kilobytes can unpack to many gigabytes, so sizes are taken from the
file's metadata first, text is read as it is stored (each value once, with numbers that point to
it) and cells a few rows at a time.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config import UserError
from pipelines.data import files
from pipelines.data.limits import LIMITS, refuse_bytes
from pipelines.data.local_files import File

# What Arrow raises for a damaged file: names in its metadata may be no text, counts no counts.
UNREADABLE = (OSError, pa.ArrowException, ValueError, OverflowError, LookupError)
_ROWS = 256  # most cells unpacked at once


@contextlib.contextmanager
def opened(file: File) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read from.

    Raises:
        UserError: where it cannot be read as one.
    """
    try:
        with files.open_file(file.path) as content, pq.ParquetFile(content) as table:
            yield table
    except UNREADABLE as error:
        raise UserError(f"{file.path}: not readable as Parquet ({error})") from None


def text_columns(file: File, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Whole columns as text, by name.

    Raises:
        UserError: where the file cannot be read, or a column is too large or no text.
    """
    with opened(file) as table:
        texts = [name for name in names if _is_text(table.schema_arrow.field(name).type)]
        check_size(table, names)
    found = {}
    try:
        with (
            files.open_file(file.path) as content,
            pq.ParquetFile(content, read_dictionary=texts) as table,
        ):
            for name in names:
                found[name] = _unpacked(table.read(columns=[name])[name])
    except UNREADABLE as error:
        raise UserError(f"{file.path}: not readable as Parquet ({error})") from None
    return found


def check_size(table: pq.ParquetFile, names: Sequence[str]) -> None:
    """Raise OSError (EFBIG) where these columns take more than a table may."""
    sizes = (_chunk_bytes(table, g, names) for g in range(table.metadata.num_row_groups))
    refuse_bytes(sum(sizes), LIMITS.table_bytes)


def cells(file: File, group: int, name: str, rows: Sequence[int]) -> list[bytes | Exception]:
    """The bytes in some rows of one row group, or what stopped the reading.

    Args:
        file: the Parquet file.
        group: number of the row group.
        name: of a column that is binary, or a struct with a field `bytes`.
        rows: within the group, in any order.
    """
    try:
        with (
            files.open_file(file.path) as content,
            pq.ParquetFile(content, buffer_size=2**20) as table,
        ):
            found = _cells(table, group, name, set(rows))
            return [found[row] for row in rows]
    except UNREADABLE as error:
        return [error for _ in rows]


def _cells(
    table: pq.ParquetFile, group: int, name: str, rows: set[int]
) -> dict[int, bytes | Exception]:
    size = _chunk_bytes(table, group, [name])
    refuse_bytes(size // max(1, table.metadata.row_group(group).num_rows), LIMITS.image_bytes)
    # No cell is larger than all of them, so that many rows take four images' bytes at most.
    at_once = max(1, min(_ROWS, 4 * LIMITS.image_bytes // max(1, size)))
    found: dict[int, bytes | Exception] = {}
    start = 0
    for batch in table.iter_batches(at_once, row_groups=[group], columns=[name]):
        column = batch.column(0)
        here = [row for row in range(start, start + len(column)) if row in rows]
        if here:
            taken = column.take(pa.array([row - start for row in here]))
            if pa.types.is_struct(taken.type):
                taken = pc.struct_field(taken, "bytes")
            found |= {row: _content(cell) for row, cell in zip(here, taken, strict=True)}
        start += len(column)
        if len(found) == len(rows):
            break
    return found


def _content(cell: pa.Scalar) -> bytes | Exception:
    if not cell.is_valid:
        return b""
    if not isinstance(cell, pa.BinaryScalar) or isinstance(cell, pa.StringScalar):
        return TypeError(f"a cell of type {cell.type}, not encoded bytes")
    size = cell.as_buffer().size
    if size > LIMITS.image_bytes:
        return OSError(errno.EFBIG, f"{size:,} bytes, over {LIMITS.image_bytes:,}")
    return bytes(cell.as_py())


def _chunk_bytes(table: pq.ParquetFile, group: int, names: Sequence[str]) -> int:
    """What these columns of a row group take once unpacked, as the file says."""
    chunks = table.metadata.row_group(group)
    parts = (chunks.column(number) for number in range(chunks.num_columns))
    return sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema.partition(".")[0] in names
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _unpacked(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text; its length is known before each value is written out."""
    if pa.types.is_dictionary(column.type):
        for chunk in column.chunks:
            lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
            refuse_bytes(pc.sum(lengths).as_py() or 0, LIMITS.table_bytes)
    return column.cast(pa.string())
