"""Which images a step sees, and their pixels: the same for any number of workers.

Nothing here has a state: the order of an epoch follows from the seed and the epoch's number, what
augmentation does to an image from these and the image. So a training that was stopped goes on at
any step, and W workers see what one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.augmentation import Augmentation
from pipelines.methods.base import TrainingConfig
from pipelines.ood.seeds import generator, stream
from pipelines.train.augment import augment
from pipelines.train.data import Images

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """The rows of one step: of the training images, and of the outliers where there are any."""

    rows: Rows
    outlier_rows: Rows | None


def steps_of(
    config: TrainingConfig, num_images: int, num_outliers: int, *, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch.

    Images are shuffled anew each epoch and all are used, in batches of `batch_size` or a little
    fewer: a short last batch would give batch normalisation bad statistics. Outliers go round in
    shuffled passes of their own, which begin anew with each epoch.

    Args:
        config: batch sizes.
        num_images: N.
        num_outliers: M; 0: none.
        seed: of the training.
        epoch: its number.
    """
    order = _shuffled(num_images, stream(seed, f"order of epoch {epoch}"))
    parts = np.array_split(order, math.ceil(num_images / config.batch_size))
    if not num_outliers:
        return [Step(rows, None) for rows in parts]
    size = config.outlier_batch_size or 2 * config.batch_size
    passes = math.ceil(len(parts) * size / num_outliers)
    drawn = np.concatenate([
        _shuffled(num_outliers, stream(seed, f"outliers of epoch {epoch}, pass {number}"))
        for number in range(passes)
    ])  # fmt: skip
    return [Step(r, drawn[i * size : (i + 1) * size]) for i, r in enumerate(parts)]


def _shuffled(count: int, seed: int) -> Rows:
    return torch.randperm(count, generator=generator(seed)).numpy()


@dataclass(frozen=True)
class Reader:
    """Augmented pixels of images by row.

    Attributes:
        how: the augmentation.
        num_views: differently augmented copies of each image.
        seed: of the training.
    """

    how: Augmentation
    num_views: int
    seed: int

    def read(self, images: Images, rows: Rows, epoch: int) -> Tensor:
        """8-bit RGB (V n, H, W, 3): all images in their first view, then in the next."""
        pixels, ids = images.read(rows), images.ids[rows]
        views = [
            augment(pixels, ids, self.how, seed=self.seed, epoch=epoch, view=view)
            for view in range(self.num_views)
        ]
        return views[0] if self.num_views == 1 else torch.cat(views)


def in_order(count: int, size: int) -> Iterator[Rows]:
    """Rows 0 .. count - 1, `size` at a time."""
    every = np.arange(count)
    yield from (every[start : start + size] for start in range(0, count, size))


def parts_of(step: Step, count: int) -> Sequence[Step]:
    """A step cut into `count` parts, whose gradients are added up."""
    count = min(count, len(step.rows))
    rows, outliers = np.array_split(step.rows, count), step.outlier_rows
    if outliers is None:
        return [Step(part, None) for part in rows]
    return [Step(r, o) for r, o in zip(rows, np.array_split(outliers, count), strict=True)]
