"""Augmented views of training images for heads on a frozen backbone.

A head is trained on features that are made once, so its images cannot be cropped anew in every
epoch. With `embed.views` each training image is encoded in that many random crops and flips as
well, and epoch e of a training takes view (e - 1) mod V. A view depends on its number and on the
image's pixels alone (`pipelines.train.augment`), not on the batch, the worker or a head's seed.

The crop is taken out of the image as the backbone sees it, resized and cropped to its square.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.pixel_pass import ViewsIdentity
from pipelines.backbones.tower import Tower
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import plain
from pipelines.data.augmentation import Augmentation
from pipelines.data.benchmarks import Benchmark
from pipelines.data.shards import Progress
from pipelines.data.storage import Storage
from pipelines.embed.benchmark import embed_pass
from pipelines.embed.config import EmbedConfig
from pipelines.train.augment import augment
from pipelines.train.draws import Ids


@dataclass(frozen=True)
class Views:
    """The features of V random views of an image, side by side: a pass over its pixels.

    Attributes:
        count: V.
        how: what is done to the image for each of them.
    """

    count: int
    how: Augmentation

    def identity(self) -> ViewsIdentity:
        """What decides the features of the views, for the address."""
        return ViewsIdentity(count=self.count, augmentation=plain(self.how))

    def width(self, tower: Tower) -> int:
        """V x D."""
        return self.count * tower.embed_dim

    def encode(self, tower: Tower, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> unit features (N, V x D), view by view."""
        pixels = pixels.cpu()
        ids = _ids(pixels)
        seen = (augment(pixels, ids, self.how, seed=0, epoch=0, view=v) for v in range(self.count))
        return torch.cat([tower.encode_image(tower.normalize(view)) for view in seen], dim=1)


def _ids(pixels: Tensor) -> Ids:
    """A number for each image that follows from its pixels alone, uint64 (N,)."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8) for image in pixels.numpy()]
    return np.frombuffer(b"".join(d.digest() for d in digests), dtype="<u8").astype(np.uint64)


def embed_views(
    benchmark: Benchmark,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    on_progress: Progress | None = None,
) -> Mapping[str, str]:
    """The address of the views' features of each source of the set `train`, made where missing.

    Args:
        benchmark: its sources and sets.
        backbone: resolved.
        storage: holds cache/features.
        settings: `views` of them, by `augmentation`; else as `pipelines.embed.stage`.
        compute: as there.
        on_progress: as there.

    Raises:
        UserError: as there.
    """
    if not settings.views or "train" not in benchmark.sets:
        return {}
    caches = embed_pass(
        benchmark,
        ["train"],
        Views(settings.views, settings.augmentation),
        backbone,
        storage,
        settings=settings,
        compute=compute,
        on_progress=on_progress,
    )
    return {source: cache.address for source, cache in caches.items()}
