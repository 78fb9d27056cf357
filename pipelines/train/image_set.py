"""The images of a benchmark's sets, decoded: what networks are trained and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError, digest
from pipelines.data.benchmarks import Benchmark
from pipelines.data.storage import Storage
from pipelines.embed.config import EmbedConfig
from pipelines.train.data import NetworkData
from pipelines.train.images import ImageTable, Making, Preparation, make

# The sets that a training reads; the others are decoded to find images that they share.
TRAIN, VALIDATION, OUTLIERS = "train", "validation", "outliers"


@dataclass(frozen=True)
class ImageSet:
    """Images out of several tables.

    Attributes:
        tables: of one size.
        table_of: (N,) each image's table; row_of: (N,) its row there.
    """

    tables: tuple[ImageTable, ...]
    table_of: NDArray[np.int64]
    row_of: NDArray[np.int64]

    @cached_property
    def ids(self) -> NDArray[np.uint64]:
        """(N,) what the random numbers of an image's augmentation start from."""
        ids = np.zeros(len(self.row_of), np.uint64)
        for number, table in enumerate(self.tables):
            chosen = self.table_of == number
            ids[chosen] = table.ids[self.row_of[chosen]]
        return ids

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """8-bit RGB (n, H, W, 3) of these rows."""
        if len(self.tables) == 1:
            return self.tables[0].read(self.row_of[rows])
        pixels = torch.empty((len(rows), *self.tables[0].size, 3), dtype=torch.uint8)
        for number, table in enumerate(self.tables):
            chosen = np.flatnonzero(self.table_of[rows] == number)
            pixels[torch.from_numpy(chosen)] = table.read(self.row_of[rows[chosen]])
        return pixels


def preparation(backbone: BackboneConfig, settings: EmbedConfig) -> Preparation:
    """How images are decoded and cropped for a backbone, as `embed` does it."""
    how = backbone.preprocessing
    if how is None:
        raise UserError(f"backbone {backbone.name}: its preprocessing is missing")
    return Preparation(
        crop=network.cropping(backbone),
        size=(how.size, how.size),
        identity=how.model_dump(mode="json"),
        code=(network.cropping,),
        how=settings.decoding(backbone.lossless_to),
    )


def tables_of(
    benchmark: Benchmark,
    backbone: BackboneConfig,
    storage: Storage,
    settings: EmbedConfig,
    making: Making,
) -> dict[str, ImageTable]:
    """The decoded images of every set, by source, from the cache or made."""
    how, keys = preparation(backbone, settings), benchmark.keys_by_source()
    return {
        name: make(
            benchmark.sources[name], storage, name=name, keys=some, preparation=how, making=making
        )
        for name, some in keys.items()
    }


def network_data(benchmark: Benchmark, tables: Mapping[str, ImageTable]) -> NetworkData:
    """What networks of a benchmark are trained on; images that could not be read are left out.

    Args:
        benchmark: its sets.
        tables: the decoded images by source.

    Raises:
        UserError: where no training image could be read.
    """
    names = [name for name in (TRAIN, VALIDATION, OUTLIERS) if name in benchmark.sets]
    found = {name: images_of(benchmark, name, tables) for name in names}
    none = ImageSet((), np.zeros(0, np.int64), np.zeros(0, np.int64)), np.zeros(0, np.int64)
    images, labels = found.get(TRAIN, none)
    if not len(labels):
        raise UserError(f"benchmark {benchmark.name!r}: no image of the set 'train' can be read")
    validation, validation_labels = found.get(VALIDATION, none)
    return NetworkData(
        class_names=benchmark.class_names,
        images=images,
        labels=labels,
        validation=validation,
        validation_labels=validation_labels,
        outliers=found[OUTLIERS][0] if OUTLIERS in found else None,
        address=address_of_sets(benchmark, names, tables),
    )


def address_of_sets(
    benchmark: Benchmark, names: Sequence[str], tables: Mapping[str, ImageTable]
) -> str:
    """A digest of these sets: the classes, which images with which labels, and their pixels."""
    sets = {name: benchmark.sets[name] for name in names}
    members = {name: [s.sources, s.keys, s.labels] for name, s in sets.items()}
    # The pixels of a source that is in none of the sets say nothing of them.
    sources = sorted({source for chosen in sets.values() for source in chosen.sources})
    used = {source: tables[source].address for source in sources}
    return digest([benchmark.class_names, members, used])


def images_of(
    benchmark: Benchmark, name: str, tables: Mapping[str, ImageTable]
) -> tuple[ImageSet, NDArray[np.int64]]:
    """A set's images that could be read, and their labels (N,)."""
    chosen = benchmark.sets[name]
    sources, keys = np.array(chosen.sources), np.array(chosen.keys, dtype=object)
    used = list(dict.fromkeys(chosen.sources))
    table_of, row_of = np.zeros(len(keys), np.int64), np.full(len(keys), -1, np.int64)
    for number, source in enumerate(used):
        here = sources == source
        table_of[here] = number
        row_of[here] = tables[source].rows_of(keys[here].tolist())
    read = row_of >= 0
    images = ImageSet(tuple(tables[s] for s in used), table_of[read], row_of[read])
    return images, np.array(chosen.labels, np.int64)[read]
