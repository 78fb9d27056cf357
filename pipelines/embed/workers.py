"""The two halves of making a shard, as `embed` hands them to its workers.

A plan row names a source, an address, a shard and its keys. Either one worker does all of it, or
a `ShardPreparer` (any CPU) decodes into 8-bit pixels and a `ShardEncoder` (a GPU) takes those.
Both ways cut the same batches, so they write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Prepared, Preparer, image_hash
from pipelines.backbones.pixel_pass import PixelPass
from pipelines.backbones.threads import torch_threads
from pipelines.backbones.tower import MakeEngine
from pipelines.data import features
from pipelines.data.features import Receipt
from pipelines.data.images import Decoding, Rejected
from pipelines.data.sources import Source
from pipelines.data.storage import Storage
from pipelines.records import Record

PLAN = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("address", pa.string()),
        pa.field("shard", pa.int64()),
        pa.field("keys", pa.list_(pa.string())),
    ]
)
# One row a shard, whatever its size: the engine can move it but neither cut nor merge it.
PREPARED = PLAN.append(pa.field("verdicts", pa.string()))
PREPARED = PREPARED.append(pa.field("hashes", pa.list_(pa.binary())))
PREPARED = PREPARED.append(pa.field("shape", pa.list_(pa.int64())))
PREPARED = PREPARED.append(pa.field("pixels", pa.large_binary()))


@dataclass(frozen=True)
class ShardPlan:
    """One unit of work: a source by its name, the address of its features, a shard, its keys."""

    name: str
    address: str
    shard: int
    keys: tuple[str, ...]

    def table(self) -> pa.Table:
        """As a row that Ray Data moves, in the schema `PLAN`."""
        columns = [[self.name], [self.address], [self.shard], [list(self.keys)]]
        return pa.table(dict(zip(PLAN.names, columns, strict=True)), schema=PLAN)

    @classmethod
    def of(cls, row: pa.Table) -> ShardPlan:
        """The plan in a row, prepared or not."""
        (values,) = row.select(PLAN.names).to_pylist()
        return cls(**{**values, "keys": tuple(values["keys"])})


class ShardReceipt(Record):
    """What a worker answers: the receipt of a shard of the source of that name."""

    name: str
    receipt: Receipt


@dataclass(frozen=True)
class Encoding:
    """How the images of a source become features: by which backbone, and from which bytes."""

    backbone: BackboneConfig
    how: Decoding
    local_features: bool


@dataclass(frozen=True)
class Work:
    """What every worker needs to know; small enough to send.

    Attributes:
        encodings: by the name of a source in the plan; sources of one encoding stand together.
        storage: where shards are written.
        batch_size, threads, device: of the encoder.
        pixel_pass: what is encoded in place of the images.
        engine: what runs the tower in place of torch.
    """

    encodings: Mapping[str, Encoding]
    storage: Storage
    batch_size: int
    threads: int
    device: str
    pixel_pass: PixelPass | None = None
    engine: MakeEngine | None = None


class ShardPreparer:
    """Plan rows to pixels."""

    def __init__(self, work: Work, sources: Mapping[str, Source]) -> None:
        """Needs the backbones' preprocessing, not their weights."""
        self.work = work
        self.sources = sources

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows of `table` with the pixels of their good images and all verdicts."""
        plans = table.select(PLAN.names)
        rows = [self._row(plans.slice(row, 1)) for row in range(table.num_rows)]
        return pa.concat_tables(rows)

    def _row(self, row: pa.Table) -> pa.Table:
        plan = ShardPlan.of(row)
        contents = self.sources[plan.name].read(plan.keys)
        preparer = _preparer(self.work.encodings[plan.name], threads=1)
        batches = preparer.batches(plan.keys, contents, self.work.batch_size)
        items = [item for batch in batches for item in batch]
        good = [item for item in items if not isinstance(item, Rejected)]
        pixels = np.stack(good) if good else np.empty((0, 1, 1, 3), np.uint8)
        verdicts = [v.args if isinstance(v, Rejected) else None for v in items]
        columns = [
            pa.array([json.dumps(verdicts)]),
            pa.array([list(map(image_hash, items))], PREPARED.field("hashes").type),
            pa.array([list(pixels.shape)], PREPARED.field("shape").type),
            _one_binary(pixels),
        ]
        return pa.Table.from_arrays([*row.columns, *columns], schema=PREPARED)


def _preparer(encoding: Encoding, threads: int) -> Preparer:
    return Preparer(network.cropping(encoding.backbone), encoding.how, threads)


def _one_binary(pixels: NDArray[np.uint8]) -> pa.Array:
    """A column of one value, the bytes of `pixels`, without a copy."""
    offsets = pa.py_buffer(np.array([0, pixels.nbytes], np.int64))
    content = pa.py_buffer(np.ascontiguousarray(pixels).reshape(-1))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])


class ShardEncoder:
    """Plan rows, or prepared ones, to shards on disk; loads a backbone when its turn comes."""

    def __init__(self, work: Work, sources: Mapping[str, Source]) -> None:
        """Load the first source's model on the work's device."""
        self.work = work
        self.sources = sources
        self.encoding = next(iter(work.encodings.values()))
        self.encoder = self._load(self.encoding)

    def _load(self, encoding: Encoding) -> Encoder:
        work = self.work
        loaded = network.load(encoding.backbone, device=work.device)
        # A pass over the pixels runs by torch: nothing is exported for it.
        makes = work.engine if work.pixel_pass is None else None
        made = makes and makes(loaded, work.batch_size, work.threads)
        return Encoder(loaded, work.batch_size, encoding.local_features, work.pixel_pass, made)

    def _encoder(self, source: str) -> Encoder:
        """Of the source's encoding: shards come one encoding after the other, so one is kept."""
        wanted = self.work.encodings[source]
        if wanted != self.encoding:
            self.encoding, self.encoder = wanted, self._load(wanted)
        return self.encoder

    def __call__(self, table: pa.Table) -> pa.Table:
        """One receipt (JSON) a row."""
        with torch_threads(self.work.threads):
            receipts = [self._shard(table.slice(row, 1)) for row in range(table.num_rows)]
        return pa.table({"receipt": [receipt.model_dump_json() for receipt in receipts]})

    def _shard(self, row: pa.Table) -> ShardReceipt:
        plan = ShardPlan.of(row)
        address, shard = plan.address, plan.shard
        storage = self.work.storage
        receipt = features.find_receipt(storage, address, shard)  # of a run beside this one
        if receipt is None:
            hashes: list[bytes | None] = []
            encoded = self._encoder(plan.name).encode(self._batches(row, plan, hashes))
            pairs = list(zip(plan.keys, encoded.verdicts, strict=True))
            receipt = features.write_shard(
                storage,
                address,
                shard=shard,
                keys=[key for key, verdict in pairs if verdict is None],
                columns=encoded.columns,
                hashes=[h for h, v in zip(hashes, encoded.verdicts, strict=True) if v is None],
                rejected=[(key, v.reason, v.message) for key, v in pairs if v is not None],
            )
        return ShardReceipt(name=plan.name, receipt=receipt)

    def _batches(
        self, row: pa.Table, plan: ShardPlan, hashes: list[bytes | None]
    ) -> Iterator[list[Prepared]]:
        """The images of a shard; `hashes` grows with them."""
        size = self.work.batch_size
        if "pixels" not in row.column_names:
            contents = self.sources[plan.name].read(plan.keys)
            preparer = _preparer(self.work.encodings[plan.name], self.work.threads)
            for batch in preparer.batches(plan.keys, contents, size):
                hashes += map(image_hash, batch)
                yield batch
            return
        hashes += row["hashes"][0].as_py()
        buffer = row["pixels"].chunk(0)[0].as_buffer()
        pixels = iter(np.frombuffer(buffer, np.uint8).reshape(row["shape"][0].as_py()))
        verdicts = json.loads(row["verdicts"][0].as_py())
        items = (next(pixels) if v is None else Rejected(*v) for v in verdicts)
        for start in range(0, len(verdicts), size):
            yield [next(items) for _ in range(min(size, len(verdicts) - start))]
