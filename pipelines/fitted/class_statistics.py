"""Class means and scatter of a set's features: one reduction over the feature shards.

A task reads one shard and gives the statistics of the set's rows in it; the driver merges them in
the order of the shards, so that Ray Data and a plain loop give the same bits. No task holds more
than a shard.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pipelines.code_digest import Code, Entry, code_of
from pipelines.compute.shard_map import map_shards
from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.members import SetMembers, SourceShard
from pipelines.ood.statistics import ClassStatistics


@dataclass(frozen=True)
class _Work:
    """What every task needs: which rows of a shard count, and K."""

    members: SetMembers
    num_classes: int


def reduce_shards(sets: FeatureSets, name: str, *, with_ray: bool) -> ClassStatistics:
    """Statistics of the set `name`, its features at unit length.

    Args:
        sets: a view that may open the set.
        name: of the set; its labels are classes.
        with_ray: Ray Data tasks; else a loop in this process, with the same result.

    Raises:
        PermissionError: where the view may not open the set.
        UserError: where none of its images could be read, or a shard is damaged.
    """
    members = sets.members(name)
    work = _Work(members, len(sets.benchmark.class_names))
    parts = map_shards(of_shard, members.shards(), work, with_ray=with_ray)
    statistics = functools.reduce(ClassStatistics.merge, parts)
    if not statistics.num_samples:
        raise UserError(f"set {name!r}: none of its images could be read")
    return statistics


def of_shard(shard: SourceShard, work: _Work) -> ClassStatistics:
    """The statistics of the set's rows in one shard."""
    rows = work.members.read(shard)
    return ClassStatistics.from_batch(
        rows.features, rows.labels, num_classes=work.num_classes, normalize=True
    )


# What decides the statistics: of one shard, their merging, and the order of shards.
OF_STATISTICS: tuple[Entry, ...] = (of_shard, ClassStatistics.merge, SetMembers.shards)


def statistics_code() -> Code:
    """The code that can decide the statistics of a set."""
    return code_of(*OF_STATISTICS, alone=(reduce_shards,))
