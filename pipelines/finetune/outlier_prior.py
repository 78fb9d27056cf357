"""Which classes the pretrained model takes outliers for: one pass over the feature shards.

Choi 2023, Algorithm 1, Step 1. The unit of work is a feature shard: a task counts the
outliers in it by the class that the zero-shot prompts predict, and the counts of shards add up to
the counts of the whole. So outliers may be far more than one machine holds, and the prior is
always measured on the backbone that is used, never shipped. Small jobs (a sweep's trials) count
the outliers that they hold anyway; the two agree.

    cache/priors/ADDRESS.json    class names and counts
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.code_digest import Code, code_of
from pipelines.compute.shard_map import map_shards
from pipelines.config import UserError, digest
from pipelines.data import kept
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.members import SetMembers, SourceShard
from pipelines.data.storage import Storage
from pipelines.heads import HeadContext, Predictor
from pipelines.heads.initial import initial_head
from pipelines.ood import ClassCounts
from pipelines.records import StoredRecord

OUTLIERS = "outliers"


class OutlierPrior(StoredRecord):
    """The content of its file: how many outliers the pretrained model takes for each class."""

    class_names: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _Work:
    """What every task needs: which rows of a shard count, and the pretrained head."""

    members: SetMembers
    predictor: Predictor


def prior_code() -> Code:
    """The code that can decide the counts: of one shard, their sum, and the zero-shot head."""
    return code_of(count_shard, ClassCounts.merge, _initial, alone=(measure, count_outliers))


def measure(
    sets: FeatureSets, backbone: BackboneConfig, storage: Storage, *, with_ray: bool = True
) -> NDArray[np.int64]:
    """How many outliers the zero-shot prompts predict as each class, (K,).

    Args:
        sets: a view of a benchmark that may open the set `outliers`, embedded.
        backbone: resolved.
        storage: where the counts are kept.
        with_ray: Ray Data tasks; else a loop in this process, with the same result.

    Raises:
        PermissionError: where the view may not open the outliers.
        UserError: where the benchmark has no outliers, none of them could be read, or a shard is
            damaged.
    """
    if OUTLIERS not in sets.benchmark.sets:
        raise UserError(f"benchmark {sets.benchmark.name!r} has no set {OUTLIERS!r} to count")
    members = sets.members(OUTLIERS)
    what = [sets.address([OUTLIERS]), dict(backbones.identity(backbone)), prior_code().digest]
    place = ("cache", "priors", f"{digest(what)}.json")
    prior = kept.find_record(storage, OutlierPrior, *place)
    if prior is None:
        names, templates = sets.benchmark.class_names, sets.benchmark.templates
        predictor = _initial(names, templates, backbone)
        counts = count_outliers(members, predictor, with_ray=with_ray)
        prior = OutlierPrior(class_names=names, counts=tuple(counts.tolist()))
        kept.write_record(storage, prior, *place)
    return np.asarray(prior.counts, dtype=np.int64)


def count_outliers(
    members: SetMembers, predictor: Predictor, *, with_ray: bool
) -> NDArray[np.int64]:
    """The outliers by predicted class (K,), shard by shard."""
    work = _Work(members, predictor)
    parts = map_shards(count_shard, members.shards(), work, with_ray=with_ray)
    total = functools.reduce(ClassCounts.merge, parts)
    if not total.counts.sum():
        raise UserError(f"set {OUTLIERS!r}: none of its images could be read")
    return np.asarray(total.counts, dtype=np.int64)


def _initial(
    class_names: tuple[str, ...], templates: tuple[str, ...], backbone: BackboneConfig
) -> Predictor:
    """The head before any training: the benchmark's prompts, or the classifier's layer."""
    network = backbones.load(backbone)
    none = torch.zeros(0, network.embed_dim), torch.zeros(0, dtype=torch.int64)
    context = HeadContext(network, class_names, templates, *none)
    predictor: Predictor = initial_head(context).predictor()
    return predictor


def count_shard(shard: SourceShard, work: _Work) -> ClassCounts:
    """The outliers of one feature shard, counted by predicted class."""
    features, predictor = work.members.read(shard).features, work.predictor
    predicted = predictor.predicted(predictor.similarity(features))
    return ClassCounts.from_batch(predicted, len(predictor.class_names))
