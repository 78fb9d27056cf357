"""Features on disk, at the address of what decides them: cache/features/ADDRESS/.

00000.parquet ...   shards: key, feature, image_hash, sorted by key; rejections are in the metadata
rejected.parquet    key, reason, message
manifest.json       written last: an address without it is unfinished work

A shard takes its name when it is complete, so a file that can be seen can be read. The first
file of a name stays, so that two runs on one cache never change what either has counted. A shard
is sealed when it is written (`pipelines.data.kept`): unfinished work is counted only as it was.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue

from pipelines.config import UserError
from pipelines.data import kept
from pipelines.data.kept import Damaged, Entry, FileSeal
from pipelines.data.schema import REJECTED, features_table, matrix
from pipelines.data.storage import Storage
from pipelines.records import Record, StoredRecord

FOLDER = ("cache", "features")
IMAGE_HASH = "image_hash"
# The column of local features (N, P, D), one for each place of an image.
LOCAL = "local_features"
REJECTED_FILE = "rejected.parquet"


@dataclass(frozen=True)
class Receipt:
    """What a finished shard holds."""

    shard: int
    rows: int
    size: int
    sha256: str
    rejected: tuple[tuple[str, str, str], ...]  # key, reason, message
    columns: Mapping[str, tuple[int, ...]]  # shape of a row


class ShardEntry(Record):
    """A shard in the manifest.

    Attributes:
        file: its name beside the manifest.
        rows: its images.
        size, sha256: of its bytes.
        first: key of its plan, the smallest.
        last: key of its plan, the largest.
    """

    file: str
    rows: int
    size: int
    sha256: str
    first: str
    last: str


class FeatureManifest(StoredRecord):
    """The content of `manifest.json`: what went in, what came out, every shard's checksum.

    Attributes:
        address: of the features.
        about: everything that the address is a digest of.
        rows: images with a feature.
        rejected: images without one.
        columns: the shape of a row in each column.
        shards: in key order.
    """

    address: str
    about: dict[str, JsonValue]
    rows: int
    rejected: int
    columns: dict[str, tuple[int, ...]]
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class FeatureCache:
    """The finished features of one source under one backbone."""

    storage: Storage
    address: str

    @cached_property
    def manifest(self) -> FeatureManifest:
        """What went in, what came out, and the checksum of each shard."""
        return self.entry.read()

    @property
    def entry(self) -> Entry[FeatureManifest]:
        """The folder of these features."""
        return Entry(self.storage, (*FOLDER, self.address), FeatureManifest)

    def path(self, name: str) -> str:
        """The full path or URI of a file of these features."""
        return self.storage.path(*FOLDER, self.address, name)

    def read_shard(self, shard: ShardEntry, columns: Sequence[str]) -> pa.Table:
        """The keys and these columns of one shard, whose checksum is that of the manifest.

        Raises:
            Damaged: where the shard's bytes are not those that were written.
            UserError: where the images were embedded without one of the columns.
        """
        for column in columns:
            self._shape(column)
        return self._read(shard, ["key", *columns])

    def load(self, keys: Sequence[str], column: str = "feature") -> NDArray[np.float32]:
        """The features of `keys`, in their order.

        Args:
            keys: N keys of the source.
            column: `feature` (N, D) or `local_features` (N, P, D).

        Raises:
            Damaged: where a shard's bytes are not those written.
            UserError: where a key has no feature.
        """
        shape = self._shape(column)
        table = self._table(keys, column)
        rows = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"])
        if rows.null_count:
            missing = [key for key, row in zip(keys, rows.to_pylist(), strict=True) if row is None]
            raise UserError(
                f"features {self.address}: {len(missing)} of {len(keys)} keys have no feature "
                f"(first: {', '.join(missing[:3])}); see {self.path(REJECTED_FILE)}"
            )
        taken: NDArray[np.float32] = matrix(table[column])[rows.to_numpy()]
        return taken.reshape(len(keys), *shape)

    def image_hashes(self, keys: Sequence[str]) -> list[bytes | None]:
        """The image hash of each of `keys` in their order, None for one without a feature."""
        table = self._table(keys, IMAGE_HASH)
        rows = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"])
        hashes: list[bytes | None] = table[IMAGE_HASH].take(rows).to_pylist()
        return hashes

    def present(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Which of `keys` have a feature (rejected ones have none)."""
        known = self.keys()
        present: NDArray[np.bool_] = pc.is_in(
            pa.array(keys, pa.string()), value_set=known
        ).to_numpy(zero_copy_only=False)
        return present

    def keys(self) -> pa.Array:
        """All keys that have a feature, sorted."""
        tables = [self._read(s, ["key"]) for s in self.manifest.shards]
        return pa.concat_tables(tables)["key"].combine_chunks()

    def rejected(self) -> pa.Table:
        """The images without a feature: key, reason, message."""
        return kept.read_table(self.storage, *FOLDER, self.address, REJECTED_FILE)

    def reasons(self) -> dict[str, int]:
        """How many images were rejected for each reason, the most frequent first."""
        return dict(Counter(self.rejected()["reason"].to_pylist()).most_common())

    def _table(self, keys: Sequence[str], column: str) -> pa.Table:
        """The shards that may hold one of `keys`; shards are cut from the sorted keys."""
        wanted = np.sort(np.asarray(keys, dtype=object))
        tables = []
        for shard in self.manifest.shards:
            start = np.searchsorted(wanted, shard.first, side="left")
            stop = np.searchsorted(wanted, shard.last, side="right")
            if stop > start:
                tables.append(self._read(shard, ["key", column]))
        if not tables:
            tables = [self._read(self.manifest.shards[0], ["key", column]).slice(0, 0)]
        return pa.concat_tables(tables)

    def _shape(self, column: str) -> tuple[int, ...]:
        """The shape of a row of that column; says how to make it where there is none."""
        if column not in self.manifest.columns:
            raise UserError(
                f"features {self.address}: no {column}; embed with embed.{column}= first"
            )
        return self.manifest.columns[column]

    def _read(self, shard: ShardEntry, columns: list[str]) -> pa.Table:
        seal = FileSeal(size=shard.size, sha256=shard.sha256)
        content = self.entry.verified(shard.file, seal)
        return pq.read_table(io.BytesIO(content), columns=columns)


def find(storage: Storage, address: str) -> FeatureCache | None:
    """The finished cache entry of that address, if there is one; what is damaged is removed."""
    cache = FeatureCache(storage, address)
    return cache if cache.entry.find() is not None else None


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"{shard:05d}.parquet"


def finished_shards(storage: Storage, address: str) -> set[int]:
    """The numbers of the shards that are there."""
    names = storage.names(*FOLDER, address)
    stems = (name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
    return {int(stem) for stem in stems if stem.isdecimal()}


def write_shard(
    storage: Storage,
    address: str,
    *,
    shard: int,
    keys: Sequence[str],
    columns: Mapping[str, NDArray[np.float32]],
    rejected: Sequence[tuple[str, str, str]],
    hashes: Sequence[bytes | None] | None = None,
) -> Receipt:
    """Write one shard, whole or not at all; one that is there already stays.

    Args:
        storage: where the cache is.
        address: of the cache entry.
        shard: its number.
        keys: N sorted keys.
        columns: `feature` (N, D) and any others (N, ..., D), stored as one list a row.
        rejected: key, reason and message of the images without a feature.
        hashes: N image hashes of 16 bytes (`pipelines.backbones.encoder.image_hash`).
    """
    table = features_table(list(keys), columns["feature"])
    for name in columns.keys() - {"feature"}:
        flat = columns[name].reshape(len(keys), math.prod(columns[name].shape[1:]))
        column = features_table(list(keys), flat)["feature"]
        table = table.append_column(pa.field(name, column.type, nullable=False), column)
    if hashes is not None:
        table = table.append_column(IMAGE_HASH, pa.array(hashes, pa.binary(16)))
    shapes = {name: column.shape[1:] for name, column in columns.items()}
    about = {"rejected": json.dumps(list(rejected)), "columns": json.dumps(shapes)}
    table = table.replace_schema_metadata(about)
    kept.write_table(storage, table, *FOLDER, address, shard_name(shard), replace=False)
    return inspect_shard(storage, address, shard)


def find_receipt(storage: Storage, address: str, shard: int) -> Receipt | None:
    """The receipt of a shard, if it is there; a damaged one is removed."""
    if not storage.exists(*FOLDER, address, shard_name(shard)):
        return None
    try:
        return inspect_shard(storage, address, shard)
    except Damaged as damaged:
        kept.discard(storage, damaged)
        return None


def inspect_shard(storage: Storage, address: str, shard: int) -> Receipt:
    """The receipt of a shard that is there, from its bytes.

    Raises:
        Damaged: where they are not those that were written.
    """
    place = (*FOLDER, address, shard_name(shard))
    content = kept.read_bytes(storage, *place)
    table = kept.open_table(storage, content, *place)
    metadata = table.schema.metadata
    rejected = tuple((k, r, m) for k, r, m in json.loads(metadata[b"rejected"]))
    columns = {name: tuple(shape) for name, shape in json.loads(metadata[b"columns"]).items()}
    seal = FileSeal.of(content)
    return Receipt(shard, table.num_rows, seal.size, seal.sha256, rejected, columns)


def finish(
    storage: Storage,
    address: str,
    *,
    receipts: Sequence[Receipt],
    bounds: Sequence[tuple[str, str]],
    about: Mapping[str, JsonValue],
) -> FeatureCache:
    """Write rejected.parquet and then the manifest, which makes the entry finished.

    Args:
        storage: where the cache is.
        address: of the cache entry.
        receipts: of all shards.
        bounds: first and last key of each shard's plan.
        about: what went into the address, for the manifest.
    """
    files = {REJECTED_FILE: write_rejected(storage, (*FOLDER, address), receipts)}
    files |= {shard_name(r.shard): FileSeal(size=r.size, sha256=r.sha256) for r in receipts}
    manifest = FeatureManifest(
        address=address,
        about=json.loads(json.dumps(about)),  # as it is read back: lists for tuples
        rows=sum(receipt.rows for receipt in receipts),
        rejected=sum(len(receipt.rejected) for receipt in receipts),
        columns=dict(receipts[0].columns),
        shards=tuple(
            ShardEntry(
                file=shard_name(receipt.shard),
                rows=receipt.rows,
                size=receipt.size,
                sha256=receipt.sha256,
                first=bounds[receipt.shard][0],
                last=bounds[receipt.shard][1],
            )
            for receipt in sorted(receipts, key=lambda receipt: receipt.shard)
        ),
    )
    cache = FeatureCache(storage, address)
    cache.entry.write(manifest, there=files)
    return cache


def write_rejected(storage: Storage, folder: kept.Parts, receipts: Sequence[Receipt]) -> FileSeal:
    """Write the table of the images that shards left out, and give the seal of its file."""
    lost = sorted(row for receipt in receipts for row in receipt.rejected)
    columns = list(zip(*lost, strict=True)) if lost else [(), (), ()]
    arrays = [pa.array(column, pa.string()) for column in columns]
    place = (*folder, REJECTED_FILE)
    kept.write_table(storage, pa.Table.from_arrays(arrays, schema=REJECTED), *place)
    return FileSeal.of(storage.read_bytes(*place))
