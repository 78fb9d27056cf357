"""Decoded images on disk, at the address of what decides them: cache/images/ADDRESS/.

    00000.arrow ...     shards: key, pixels (H * W * 3 bytes), sorted by key, in Arrow's IPC format
    00000.json ...      the receipt of each shard, with the seal of its file
    rejected.parquet    key, reason, message
    manifest.json       written last: an address without it is unfinished work

An Arrow file is laid out as its columns lie in memory, so `ImageTable` maps the files and copies
what is read: memory does not grow with the number of images, and whatever shares a machine shares
one copy in the system's page cache. A receipt is written after its file, so a restart counts only
what is whole, and a shard that is not as it was written is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import JsonValue

from pipelines.backbones.encoder import Pixels, Prepared, Preparer
from pipelines.code_digest import Code, Entry, code_of
from pipelines.compute.shard_map import map_shards
from pipelines.config import UserError, digest
from pipelines.data import features, kept
from pipelines.data.features import Receipt
from pipelines.data.images import DEFAULT, Decoding, Rejected
from pipelines.data.kept import FileSeal
from pipelines.data.shards import Progress, Shards, Tally, cut, digest_of_keys, source_code
from pipelines.data.sources import Source
from pipelines.data.storage import Storage
from pipelines.records import Record, StoredRecord
from pipelines.train.image_table import (
    FOLDER,
    KEY,
    PIXELS,
    ImageManifest,
    ImageTable,
    shard_name,
)

__all__ = ["ImageTable", "Making", "Preparation", "address_of", "image_code", "make"]

# Encoded images that a worker holds at a time, and decoded ones.
READ_ROWS, BLOCK_ROWS = 1024, 256


@dataclass(frozen=True)
class Preparation:
    """How the bytes of an image become the pixels that are kept.

    Attributes:
        crop: an RGB image to an RGB image of `size`; it is sent to workers, so it has to pickle.
        size: height and width of what `crop` gives, in pixels.
        identity: all that decides what `crop` does, for the address.
        code: what `crop` runs of this project, for the address.
        how: how bytes become an RGB image.
    """

    crop: Callable[[Image.Image], Image.Image]
    size: tuple[int, int]
    identity: Mapping[str, JsonValue]
    code: tuple[Entry, ...] = ()
    how: Decoding = field(default=DEFAULT)


@dataclass(frozen=True)
class Making:
    """How the files are made.

    Attributes:
        shard_rows: images of a file; the only one of these that is part of the address.
        max_rejected: the share of images that may be bad, 0 to 1.
        with_ray: in Ray Data tasks where there are several shards; else in this process, with
            the same bytes.
        at_once: tasks at a time; by default as many as Ray has CPUs for.
        on_progress: called after each shard with images done, all images, rejected images.
    """

    shard_rows: int = 4096
    max_rejected: float = 0.05
    with_ray: bool = True
    at_once: int | None = None
    on_progress: Progress | None = None


class ImageIdentity(Record):
    """Everything that changes a byte of the decoded images of one source.

    Attributes:
        source: the fingerprint of the images.
        keys: `all`, or a digest of those that were chosen.
        preprocessing: what the caller says of its crop.
        size: height and width in pixels.
        decoding: the fields of `Decoding`.
        shard_rows: images of a file.
        code: the digest of what computes.
    """

    source: str
    keys: str
    preprocessing: dict[str, JsonValue]
    size: tuple[int, int]
    decoding: dict[str, str | int]
    shard_rows: int
    code: str


class ShardRecord(StoredRecord):
    """The content of a shard's JSON file: its receipt. The record's seal vouches for the file."""

    receipt: Receipt


@dataclass(frozen=True)
class ImageShard:
    """One unit of work: the number of a shard and its keys."""

    number: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Work:
    """What every task needs; it is sent to workers."""

    source: Source
    storage: Storage
    address: str
    size: tuple[int, int]
    preparer: Preparer


def make(
    source: Source,
    storage: Storage,
    *,
    name: str,
    keys: Sequence[str] | None,
    preparation: Preparation,
    making: Making | None = None,
) -> ImageTable:
    """The decoded images of a source (or of `keys` of it), from the cache or made.

    Whatever is there is read once to see that it is as it was written; what is not is made again.

    Args:
        source: of the encoded images.
        storage: holds cache/images.
        name: of the source, for messages.
        keys: which images; all where None.
        preparation: how bytes become pixels.
        making: how the files are made.

    Raises:
        UserError: for an empty source or choice, an unknown or doubled key, more bad images than
            `making.max_rejected`, or a crop that gives another size than it says.
    """
    options = making or Making()
    identity = _identity(source, keys, preparation, options.shard_rows)
    table = ImageTable(storage, digest(identity.model_dump(mode="json")))
    if table.entry.find() is not None:
        return table
    shards = cut(name, source, keys=keys, shard_rows=options.shard_rows)
    tally = Tally({name: sum(map(len, shards))}, options.max_rejected, options.on_progress)
    preparer = Preparer(preparation.crop, preparation.how)
    work = _Work(source, storage, table.address, preparation.size, preparer)
    rows = [ImageShard(number, keys) for number, keys in enumerate(shards)]
    # A single shard has nobody to share its work with: no worker is started for it.
    with_ray = options.with_ray and len(rows) > 1
    for receipt in map_shards(make_shard, rows, work, with_ray=with_ray, at_once=options.at_once):
        tally.add(name, receipt)
    _finish(table, identity, shards, tally.receipts[name])
    return table


def address_of(
    source: Source, keys: Sequence[str] | None, preparation: Preparation, shard_rows: int
) -> str:
    """Where `make` puts the images, below cache/images/."""
    identity = _identity(source, keys, preparation, shard_rows)
    return digest(identity.model_dump(mode="json"))


def receipt_name(shard: int) -> str:
    """The file of a shard's receipt."""
    return f"{shard:05d}.json"


def image_code(source: Source, preparation: Preparation) -> Code:
    """The code that can decide a pixel, from the plan of shards to the bytes that are written."""
    return code_of(make_shard, cut, *preparation.code, *source_code(source))


def make_shard(shard: ImageShard, work: _Work) -> Receipt:
    """Read, decode and write the images of one shard, unless its file is there as it was written.

    Raises:
        UserError: where the crop gives another size than it says.
    """
    record = receipt_name(shard.number)
    entry = kept.Entry(work.storage, (*FOLDER, work.address), ShardRecord, name=record)
    if (known := entry.find()) is not None:
        return known.receipt
    rejected: list[tuple[str, str, str]] = []
    with work.storage.writing(*FOLDER, work.address, shard_name(shard.number)) as path:
        rows = _write(path, _blocks(shard, work, rejected), work.size)
        seal = FileSeal.of_file(path)
    receipt = Receipt(
        shard=shard.number,
        rows=rows,
        size=seal.size,
        sha256=seal.sha256,
        rejected=tuple(rejected),
        columns={PIXELS: (*work.size, 3)},
    )
    entry.write(ShardRecord(receipt=receipt), there={shard_name(shard.number): seal})
    return receipt


def _blocks(
    shard: ImageShard, work: _Work, rejected: list[tuple[str, str, str]]
) -> Iterator[tuple[list[str], list[Pixels]]]:
    """The keys and pixels of good images, at most `BLOCK_ROWS` at a time; `rejected` grows."""
    for keys in _parts(shard.keys, READ_ROWS):
        batches = work.preparer.batches(keys, work.source.read(keys), BLOCK_ROWS)
        for names, batch in zip(_parts(keys, BLOCK_ROWS), batches, strict=True):
            good: list[str] = []
            pixels: list[Pixels] = []
            for key, item in zip(names, batch, strict=True):
                if isinstance(item, Rejected):
                    rejected.append((key, item.reason, item.message))
                else:
                    good.append(key)
                    pixels.append(_of_size(item, key, work.size))
            if good:
                yield good, pixels


def _parts(keys: Sequence[str], rows: int) -> Iterator[Sequence[str]]:
    return (keys[start : start + rows] for start in range(0, len(keys), rows))


def _of_size(pixels: Prepared, key: str, size: tuple[int, int]) -> Pixels:
    assert not isinstance(pixels, Rejected)
    if pixels.shape != (*size, 3):
        raise UserError(
            f"{key}: the crop gave pixels {pixels.shape}, and (H, W) is to be {size}: give a crop "
            "of one size to RGB, or that size"
        )
    return pixels


def _write(
    path: Path, blocks: Iterator[tuple[list[str], list[Pixels]]], size: tuple[int, int]
) -> int:
    """Write an Arrow file of one record batch a block; the number of its rows."""
    length = size[0] * size[1] * 3
    kind = pa.list_(pa.uint8(), length)
    fields = [pa.field(KEY, pa.string(), nullable=False), pa.field(PIXELS, kind, nullable=False)]
    schema, rows = pa.schema(fields), 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for keys, pixels in blocks:
            flat = pa.array(np.stack(pixels).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, length)
            arrays = [pa.array(keys, pa.string()), column]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            rows += len(keys)
    return rows


def _identity(
    source: Source, keys: Sequence[str] | None, preparation: Preparation, shard_rows: int
) -> ImageIdentity:
    """All that changes a byte of the files."""
    return ImageIdentity(
        source=source.fingerprint(),
        keys=digest_of_keys(keys),
        preprocessing=dict(preparation.identity),
        size=preparation.size,
        decoding=asdict(preparation.how),
        shard_rows=shard_rows,
        code=image_code(source, preparation).digest,
    )


def _finish(
    table: ImageTable, identity: ImageIdentity, shards: Shards, receipts: Sequence[Receipt]
) -> None:
    """Write what was left out and then the manifest, which makes the images finished."""
    storage, folder = table.storage, table.entry.folder
    files = {features.REJECTED_FILE: features.write_rejected(storage, folder, receipts)}
    for receipt in receipts:
        seal = FileSeal(size=receipt.size, sha256=receipt.sha256)
        files[shard_name(receipt.shard)] = seal
        name = receipt_name(receipt.shard)
        files[name] = FileSeal.of(kept.read_bytes(storage, *folder, name))
    manifest = ImageManifest(
        address=table.address,
        about=json.loads(identity.model_dump_json()),
        rows=sum(receipt.rows for receipt in receipts),
        rejected=sum(len(receipt.rejected) for receipt in receipts),
        size=identity.size,
        shards=tuple(
            features.ShardEntry(
                file=shard_name(receipt.shard),
                rows=receipt.rows,
                size=receipt.size,
                sha256=receipt.sha256,
                first=shards[receipt.shard][0],
                last=shards[receipt.shard][-1],
            )
            for receipt in receipts
        ),
    )
    table.entry.write(manifest, there=files)
