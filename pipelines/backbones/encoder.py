"""Encoded bytes in, features out, on one worker: decode, crop, pad to full batches, encode.

No Ray here: `embed` runs this in its tasks and actors, and one process can use it alone. A
`Preparer` turns bytes into 8-bit pixels and needs no weights; an `Encoder` turns pixels into
features and needs no files.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.backbones.pixel_pass import PixelPass
from pipelines.backbones.tower import Encode, Tower
from pipelines.data.images import DEFAULT, Decoding, Rejected, decode

Pixels = NDArray[np.uint8]  # (H, W, 3): the evaluation crop
Prepared = Pixels | Rejected
FEATURE, LOCAL = "feature", "local_features"


@dataclass(frozen=True)
class Preparer:
    """Bytes to pixels of the model's size.

    Attributes:
        crop: the model's resize and crop, see `Tower.crop`.
        how: how bytes become RGB pixels.
        threads: Pillow decodes and resizes without holding Python's lock.
    """

    crop: Callable[[Image.Image], Image.Image]
    how: Decoding = DEFAULT
    threads: int = 1

    def batches(
        self, keys: Sequence[str], contents: Sequence[bytes | Exception], size: int
    ) -> Iterator[list[Prepared]]:
        """Pixels or a reason for each image, `size` images at a time, in order."""
        if len(keys) != len(contents):
            raise ValueError(f"{len(keys)} keys and {len(contents)} contents")
        parts = (contents[start : start + size] for start in range(0, len(contents), size))
        if self.threads == 1:
            yield from ([self.one(content) for content in part] for part in parts)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            yield from (list(pool.map(self.one, part)) for part in parts)

    def one(self, content: bytes | Exception) -> Prepared:
        """Pixels of one image, or what is wrong with it."""
        if isinstance(content, Exception):
            return _unread(content)
        try:
            image = decode(content, self.how)
        except Rejected as reason:
            return reason
        return np.asarray(self.crop(image))


def image_hash(pixels: Prepared) -> bytes | None:
    """16 bytes of the SHA-256 of what the backbone sees of an image, its evaluation crop.

    Images under other names, with other metadata or in another lossless format are equal by it;
    an image that was compressed anew is not. None for a rejected image.
    """
    if isinstance(pixels, Rejected):
        return None
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()[:16]


@dataclass(frozen=True)
class Encoded:
    """Features of the good images, in order, and a verdict on every image.

    Attributes:
        columns: `feature` (M, D) and, where asked for, `local_features` (M, P, D); float32, unit
            length.
        verdicts: a reason, or None for each good image.
    """

    columns: dict[str, NDArray[np.float32]]
    verdicts: list[Rejected | None]


@dataclass(frozen=True)
class Encoder:
    """Pixels to features, in batches of one size.

    Attributes:
        tower: the backbone.
        batch_size: every batch is padded to it, since a network's result depends on the size
            of the batch in its last bit.
        local_features: whether to keep local features too, see `pipelines.backbones.local`.
        pixel_pass: what is encoded in place of the images as they are.
        engine: encodes in place of the tower, see `pipelines.backbones.onnx_engine`.
    """

    tower: Tower
    batch_size: int
    local_features: bool = False
    pixel_pass: PixelPass | None = None
    engine: Encode | None = None

    def encode(self, batches: Iterable[list[Prepared]]) -> Encoded:
        """Features of everything in `batches`.

        On a GPU each batch is copied and encoded while the next one is still being prepared:
        nothing waits for a result before the end.
        """
        queued: list[dict[str, Tensor]] = [self._queue([])]
        verdicts: list[Rejected | None] = []
        for batch in batches:
            good = [pixels for pixels in batch if not isinstance(pixels, Rejected)]
            verdicts += [item if isinstance(item, Rejected) else None for item in batch]
            queued.append(self._queue(good))
        columns = {
            name: torch.cat([part[name] for part in queued]).cpu().numpy() for name in queued[0]
        }
        return _drop_not_finite(Encoded(columns, verdicts))

    def _queue(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """Start the work on at most `batch_size` images; features on the model's device."""
        if not images:
            own = self.pixel_pass
            dim = self.tower.embed_dim if own is None else own.width(self.tower)
            device = self.tower.device
            shapes: dict[str, tuple[int, ...]] = {FEATURE: (0, dim)}
            if self.local_features:
                shapes[LOCAL] = (0, self.tower.num_local, dim)
            return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        names = (FEATURE, LOCAL) if self.local_features else (FEATURE,)
        return dict(zip(names, self._padded(np.stack(images)), strict=True))

    def _padded(self, pixels: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Features of images (n, H, W, 3) from a batch that is filled up with black ones."""
        full = np.zeros((self.batch_size, *pixels.shape[1:]), np.uint8)
        full[: len(pixels)] = pixels
        batch = torch.from_numpy(full)
        if self.tower.device.type == "cuda":
            batch = batch.pin_memory()
        outputs: tuple[Tensor, ...]
        if self.pixel_pass is not None:
            outputs = (self.pixel_pass.encode(self.tower, batch),)
        elif self.local_features:
            outputs = self.tower.encode_with_local(self.tower.normalize(batch))
        else:
            outputs = ((self.engine or self.tower.encode_image)(self.tower.normalize(batch)),)
        return tuple(output[: len(pixels)] for output in outputs)


def _drop_not_finite(encoded: Encoded) -> Encoded:
    columns = encoded.columns.values()
    finite = np.all([np.isfinite(c).all(axis=tuple(range(1, c.ndim))) for c in columns], axis=0)
    if finite.all():
        return encoded
    bad = Rejected("not_finite", "the feature is not a finite number")
    is_finite = iter(finite.tolist())
    verdicts = [v if v is not None or next(is_finite) else bad for v in encoded.verdicts]
    return Encoded({name: c[finite] for name, c in encoded.columns.items()}, verdicts)


def of_both(one: Encoded, other: Encoded) -> tuple[Encoded, Encoded]:
    """The features of the images that are good in both passes over the same images."""
    verdicts = [a or b for a, b in zip(one.verdicts, other.verdicts, strict=True)]

    def kept(encoded: Encoded) -> Encoded:
        pairs = zip(encoded.verdicts, verdicts, strict=True)
        rows = np.array([both is None for own, both in pairs if own is None], dtype=bool)
        return Encoded({name: c[rows] for name, c in encoded.columns.items()}, verdicts)

    return kept(one), kept(other)


def _unread(error: Exception) -> Rejected:
    if isinstance(error, Rejected):
        return error
    reason = "missing" if isinstance(error, FileNotFoundError | KeyError) else "unreadable"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        reason = "too_large"
    return Rejected(reason, f"{type(error).__name__}: {error}")
