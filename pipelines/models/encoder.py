"""Encoded bytes in, features out, on one worker: decode, crop, pad to full batches, encode.

No Ray here: `embed` runs this in its actors, and a single process can use it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.data.images import Decoding, Rejected, decode
from pipelines.models.clip import Clip

Pixels = NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class Encoder:
    """A backbone with its way of decoding and its batch size.

    Attributes:
        clip: the backbone.
        how: how bytes become RGB pixels.
        batch_size: every batch has this size, the last one padded, since a network's result
            depends on the size of the batch in its last bit.
        threads: decoding threads; Pillow decodes and resizes without holding Python's lock.
    """

    clip: Clip
    how: Decoding
    batch_size: int
    threads: int = 1

    def encode(
        self, contents: Sequence[bytes | Exception]
    ) -> tuple[NDArray[np.float32], list[Rejected | None]]:
        """Features (M, D) of the good images in order, and per image a reason or None."""
        parts: list[NDArray[np.float32]] = []
        verdicts: list[Rejected | None] = []
        for batch in self._prepared(contents):
            good = [pixels for pixels in batch if not isinstance(pixels, Rejected)]
            features = self.encode_pixels(good)
            finite = [bool(np.isfinite(feature).all()) for feature in features]
            found = iter(finite)
            verdicts += [p if isinstance(p, Rejected) else _finite(next(found)) for p in batch]
            parts.append(features[np.array(finite, bool)])
        empty = np.empty((0, self.clip.embed_dim), np.float32)
        return np.concatenate([empty, *parts]), verdicts

    def encode_pixels(self, pixels: Sequence[Pixels]) -> NDArray[np.float32]:
        """Features (N, D) of at most `batch_size` cropped images; padded while encoding."""
        if not pixels:
            return np.empty((0, self.clip.embed_dim), np.float32)
        stacked = np.zeros((self.batch_size, *pixels[0].shape), np.uint8)
        stacked[: len(pixels)] = np.stack(pixels)
        features = self.clip.encode_image(self.clip.normalize(torch.from_numpy(stacked)))
        return features[: len(pixels)].cpu().numpy()

    def prepare(self, content: bytes | Exception) -> Pixels | Rejected:
        """Decoded, resized and cropped 8-bit RGB (H, W, 3), or what is wrong with it."""
        if isinstance(content, Exception):
            return _unread(content)
        try:
            return np.asarray(self.clip.crop(decode(content, self.how)))
        except Rejected as reason:
            return reason

    def _prepared(self, contents: Sequence[bytes | Exception]) -> Iterator[list[Pixels | Rejected]]:
        starts = range(0, len(contents), self.batch_size)
        batches = (contents[start : start + self.batch_size] for start in starts)
        if self.threads == 1:
            yield from ([self.prepare(content) for content in batch] for batch in batches)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            yield from (list(pool.map(self.prepare, batch)) for batch in batches)


def _unread(error: Exception) -> Rejected:
    if isinstance(error, Rejected):
        return error
    missing = isinstance(error, FileNotFoundError | KeyError)
    return Rejected("missing" if missing else "unreadable", f"{type(error).__name__}: {error}")


def _finite(finite: bool) -> Rejected | None:
    return None if finite else Rejected("not_finite", "the feature is not a finite number")
