"""Reading decoded images: the files are mapped into memory, and what is read is copied.

`pipelines.train.images` writes them. A storage that is not a folder of this machine is copied to
a temporary folder first, which goes with the table.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from pipelines.backbones.encoder import image_hash
from pipelines.data import kept
from pipelines.data.features import REJECTED_FILE, ShardEntry
from pipelines.data.kept import Damaged, Entry, FileSeal
from pipelines.data.storage import Storage
from pipelines.records import StoredRecord

FOLDER = ("cache", "images")
KEY, PIXELS = "key", "pixels"
# Images that are read at a time to be hashed.
HASHED_ROWS = 4096

Rows: TypeAlias = NDArray[np.int64] | Tensor | Sequence[int]


class ImageManifest(StoredRecord):
    """The content of `manifest.json`: what went in, what came out, every file's checksum.

    Attributes:
        address: of the images.
        about: everything that the address is a digest of.
        rows: images that could be read.
        rejected: images that could not.
        size: height and width in pixels.
        shards: in key order.
    """

    address: str
    about: dict[str, JsonValue]
    rows: int
    rejected: int
    size: tuple[int, int]
    shards: tuple[ShardEntry, ...]


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"{shard:05d}.arrow"


@dataclass(frozen=True)
class _Mapped:
    """The record batches of all files, which lie on disk until their bytes are touched.

    Attributes:
        keys: of each batch.
        pixels: the bytes of each batch, n * H * W * 3.
        starts: the number of rows before each batch, int64.
    """

    keys: tuple[pa.Array, ...]
    pixels: tuple[memoryview, ...]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class ImageTable:
    """The decoded images of one source at an address, in the order of their keys.

    Nothing is read before it is asked for, and opening the files reads where their columns lie
    and no pixel: that they have the size they were written with is seen then, a changed byte by
    `check` (and by `pipelines.train.images.make`). It passes to another process as its address.

    Attributes:
        storage: holds cache/images.
        address: of the images, below it.
    """

    storage: Storage
    address: str

    def __reduce__(self) -> tuple[type[ImageTable], tuple[Storage, str]]:
        """How it passes from one process to another: maps stay where they are."""
        return type(self), (self.storage, self.address)

    def __len__(self) -> int:
        """The number of images."""
        return self.manifest.rows

    @property
    def entry(self) -> Entry[ImageManifest]:
        """The folder of these images."""
        return Entry(self.storage, (*FOLDER, self.address), ImageManifest)

    @cached_property
    def manifest(self) -> ImageManifest:
        """What went in, what came out, and the checksum of each file.

        Raises:
            Damaged: where it is missing or not as it was written.
        """
        return self.entry.read()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.manifest.size

    @property
    def keys(self) -> pa.ChunkedArray:
        """The keys of the N images, sorted; they lie in the mapped files."""
        return pa.chunked_array(self._mapped.keys, pa.string())

    @cached_property
    def ids(self) -> NDArray[np.uint64]:
        """A number of each image, uint64 (N,): the first 8 bytes of its key's SHA-256.

        The key alone decides it: two sources that share keys are told apart by their seeds.
        """
        digests = (
            hashlib.sha256(key.encode()).digest()[:8]
            for keys in self._mapped.keys
            for key in keys.to_pylist()
        )
        return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)

    def rows_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """The row of each of `keys` in their order, int64, -1 for one that is not here."""
        rows = pc.index_in(pa.array(keys, pa.string()), value_set=self.keys)
        found: NDArray[np.int64] = pc.fill_null(rows, -1).to_numpy().astype(np.int64)
        return found

    def read(self, rows: Rows) -> Tensor:
        """A copy of the images in `rows`, uint8 (n, H, W, 3), in their order.

        Args:
            rows: n numbers from 0 to N - 1, in any order; one may stand there twice.

        Raises:
            IndexError: for a row that is none.
            Damaged: where a file is missing or has not the size it was written with.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if not len(wanted):
            return torch.empty((0, *self.size, 3), dtype=torch.uint8)
        if not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"rows from {wanted.min()} to {wanted.max()}: give 0 to {len(self) - 1}"
            )
        pixels, starts = self._mapped.pixels, self._mapped.starts
        length = self.size[0] * self.size[1] * 3
        batches = np.searchsorted(starts, wanted, side="right") - 1
        places = zip(batches.tolist(), ((wanted - starts[batches]) * length).tolist(), strict=True)
        # Slices of memory cost a third of what slices of an array do, and a batch has many.
        content = bytearray().join([pixels[batch][at : at + length] for batch, at in places])
        return torch.frombuffer(content, dtype=torch.uint8).view(-1, *self.size, 3)

    def image_hashes(self, keys: Sequence[str]) -> list[bytes | None]:
        """The hash of each image as the network sees it; None for a key that is not here."""
        rows = self.rows_of(keys)
        found: list[bytes | None] = [None] * len(keys)
        for start in range(0, len(keys), HASHED_ROWS):
            places = [n for n in range(start, min(start + HASHED_ROWS, len(keys))) if rows[n] >= 0]
            for place, pixels in zip(places, self.read(rows[places]).numpy(), strict=True):
                found[place] = image_hash(pixels)
        return found

    def rejected(self) -> pa.Table:
        """The images that could not be read: key, reason, message."""
        return kept.read_table(self.storage, *FOLDER, self.address, REJECTED_FILE)

    def check(self) -> None:
        """Read every file once.

        Raises:
            Damaged: where one is missing or not as it was written.
        """
        self.entry.check()

    @cached_property
    def _mapped(self) -> _Mapped:
        """The files, mapped."""
        folder, shards = self._local_folder(), self.manifest.shards
        batches = [b for shard in shards for b in self._batches(folder / shard.file, shard)]
        counts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        return _Mapped(
            keys=tuple(batch[KEY] for batch in batches),
            pixels=tuple(
                memoryview(batch[PIXELS].flatten().to_numpy(zero_copy_only=True))
                for batch in batches
            ),
            starts=counts[:-1],
        )

    def _batches(self, path: Path, shard: ShardEntry) -> list[pa.RecordBatch]:
        """The record batches of a file, once it is found to have its size."""
        if not path.is_file():
            raise self._damaged(shard, "missing")
        if (size := path.stat().st_size) != shard.size:
            raise self._damaged(shard, f"{size} bytes, and {shard.size} were written here")
        try:
            # Closing ends the file's descriptor; its map lives as long as the batches.
            with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
                batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(shard, f"not readable ({error})") from None
        if sum(batch.num_rows for batch in batches) != shard.rows:
            raise self._damaged(shard, f"it does not hold the {shard.rows} images written here")
        return batches

    def _local_folder(self) -> Path:
        """The folder of the files, or a temporary one with copies of them."""
        if self.storage.is_local:
            return self.storage.local(*FOLDER, self.address)
        folder = Path(tempfile.mkdtemp(prefix="images-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for shard in self.manifest.shards:
            path = folder / shard.file
            with contextlib.suppress(FileNotFoundError):
                self.storage.fetch(path, *FOLDER, self.address, shard.file)
                if FileSeal.of_file(path) != FileSeal(size=shard.size, sha256=shard.sha256):
                    raise self._damaged(shard, "not the bytes that were written here")
        return folder

    def _damaged(self, shard: ShardEntry, why: str) -> Damaged:
        place = (*FOLDER, self.address, shard.file)
        return Damaged(self.storage.path(*place), why, [place, self.entry.place])
