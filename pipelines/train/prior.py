"""Which classes a network takes outliers for before training: one Ray Data pass over their pixels.

Choi 2023, Algorithm 1, step 1: the share of each class is the prior of balanced energy. It is
measured on the network that training starts from, never shipped.

    cache/priors/ADDRESS.json    class names and counts
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.code_digest import Code, code_of
from pipelines.compute.shard_map import map_shards
from pipelines.config import UserError, digest
from pipelines.data import kept
from pipelines.data.storage import Storage
from pipelines.ood import ClassCounts
from pipelines.records import StoredRecord
from pipelines.train.data import Images
from pipelines.train.loop import logits_of

# Images of a task: reading the network's weights takes as long as a few hundred small images.
AT_ONCE = 20_000


class ImagePrior(StoredRecord):
    """The content of its file: how many outliers the network takes for each class."""

    class_names: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Rows `start` .. `stop` - 1 of the outliers."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Work:
    """What every task needs."""

    outliers: Images
    backbone: BackboneConfig
    class_names: tuple[str, ...]


def prior_code(backbone: BackboneConfig) -> Code:
    """The code that can decide the counts."""
    return code_of(count_part, ClassCounts.merge, *backbones.code(backbone), alone=(measure,))


def measure(
    outliers: Images,
    address: str,
    class_names: tuple[str, ...],
    backbone: BackboneConfig,
    storage: Storage,
    *,
    with_ray: bool = True,
) -> NDArray[np.int64]:
    """How many outliers the backbone's own layer predicts as each class, (K,).

    Args:
        outliers: the images.
        address: of what they are.
        class_names: the K classes among which it predicts.
        backbone: resolved, with weights.
        storage: where the counts are kept.
        with_ray: Ray Data tasks; else a loop in this process, with the same result.

    Raises:
        UserError: where there is no outlier, or the backbone has no weights.
    """
    if not len(outliers.ids):
        raise UserError("set 'outliers': there is no image to count")
    what = [address, list(class_names), dict(backbones.identity(backbone))]
    place = ("cache", "priors", f"{digest([*what, prior_code(backbone).digest])}.json")
    known = kept.find_record(storage, ImagePrior, *place)
    if known is None:
        count = len(outliers.ids)
        parts = [Part(i, min(i + AT_ONCE, count)) for i in range(0, count, AT_ONCE)]
        work = _Work(outliers, backbone, class_names)
        counted = map_shards(count_part, parts, work, with_ray=with_ray)
        total = functools.reduce(ClassCounts.merge, counted).counts
        known = ImagePrior(class_names=class_names, counts=tuple(total.tolist()))
        kept.write_record(storage, known, *place)
    return np.asarray(known.counts, dtype=np.int64)


def count_part(part: Part, work: _Work) -> ClassCounts:
    """The outliers of one part, counted by predicted class."""
    network = backbones.trainable(work.backbone, work.class_names, "backbone", 0)
    rows = np.arange(part.start, part.stop)
    logits = logits_of(network, work.outliers, rows)
    return ClassCounts.from_batch(logits.argmax(dim=1).numpy(), len(work.class_names))
