"""Which classes the pretrained model takes outliers for: one Ray Data pass over the shards.

Choi 2023, Algorithm 1, Step 1. The unit of work is a feature shard: a task counts the
outliers in it by the class that the zero-shot prompts predict, and the counts of shards add up to
the counts of the whole. So outliers may be far more than one machine holds, and the prior is
always measured on the backbone that is used, never shipped. Small jobs (a sweep's trials) count
the outliers that they hold anyway; the two agree.

    cache/priors/ADDRESS.json    class names and counts, found by outliers, prompts and backbone
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipelines.backbones import clip as backbones
from pipelines.backbones.clip import BackboneConfig
from pipelines.config import UserError, digest
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.schema import matrix
from pipelines.data.storage import Storage
from pipelines.heads import HeadContext, Predictor, build
from pipelines.heads.zero_shot import Config as ZeroShotConfig
from pipelines.ood import ClassCounts

OUTLIERS = "outliers"


@dataclass(frozen=True)
class _Work:
    """What every task needs; put once into Ray's object store."""

    storage: Storage
    predictor: Predictor
    keys: Mapping[str, pa.Array]  # of the outliers in each source, sorted


def measure(sets: FeatureSets, backbone: BackboneConfig, storage: Storage) -> NDArray[np.int64]:
    """How many outliers the zero-shot prompts predict as each class, (K,); needs Ray.

    Args:
        sets: a benchmark with the set `outliers`, embedded.
        backbone: resolved.
        storage: where the features lie, and where the counts are kept.

    Raises:
        UserError: where the benchmark has no outliers, or none of them could be read.
    """
    if OUTLIERS not in sets.benchmark.sets:
        raise UserError(f"benchmark {sets.benchmark.name!r} has no set {OUTLIERS!r} to count")
    identity = dict(backbones.identity(backbone))
    place = ("cache", "priors", f"{digest([sets.address([OUTLIERS]), identity])}.json")
    if not storage.exists(*place):
        counts = _count(sets, backbone, storage)
        names = list(sets.benchmark.class_names)
        storage.write_json({"class_names": names, "counts": counts.tolist()}, *place)
    return np.asarray(storage.read_json(*place)["counts"], dtype=np.int64)


def _count(sets: FeatureSets, backbone: BackboneConfig, storage: Storage) -> NDArray[np.int64]:
    import ray.data

    keys = _keys(sets)
    units = [
        {"source": source, "path": path} for source in keys for path in sets.caches[source].shards()
    ]
    work = ray.put(_Work(storage, _zero_shot(sets, backbone), keys))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    task: Any = _count_shards  # takes a keyword more than map_batches' type knows
    dataset = ray.data.from_arrow(
        [pa.Table.from_pylist([unit]) for unit in units]
    ).map_batches(
        task, batch_size=1, batch_format="pyarrow", fn_kwargs={"shared": work}, num_cpus=1
    )  # fmt: skip
    # Rows come as shards are done: no more than one vector of counts is held at a time.
    parts = (ClassCounts(np.asarray(row["counts"])) for row in dataset.iter_rows())
    total = functools.reduce(ClassCounts.merge, parts)
    if not total.counts.sum():
        raise UserError(f"set {OUTLIERS!r}: none of its images could be read")
    return np.asarray(total.counts, dtype=np.int64)


def _keys(sets: FeatureSets) -> dict[str, pa.Array]:
    """The outliers' keys by source, sorted."""
    chosen = sets.benchmark.sets[OUTLIERS]
    found: dict[str, list[str]] = {}
    for source, key in zip(chosen.sources, chosen.keys, strict=True):
        found.setdefault(source, []).append(key)
    return {source: pa.array(sorted(keys), pa.string()) for source, keys in found.items()}


def _zero_shot(sets: FeatureSets, backbone: BackboneConfig) -> Predictor:
    """The pretrained head: the benchmark's prompts, frozen."""
    clip = backbones.load(backbone)
    benchmark = sets.benchmark
    none = torch.zeros(0, clip.embed_dim), torch.zeros(0, dtype=torch.int64)
    context = HeadContext(clip, benchmark.class_names, benchmark.templates, *none)
    predictor: Predictor = build(ZeroShotConfig(), context, 0).predictor()
    return predictor


def _count_shards(batch: Any, shared: Any) -> Any:
    import ray

    work: _Work = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    counts = [count_shard(unit, work).counts.tolist() for unit in batch.to_pylist()]
    return pa.table({"counts": pa.array(counts, pa.list_(pa.int64()))})


def count_shard(unit: Mapping[str, Any], work: _Work) -> ClassCounts:
    """The outliers of one feature shard, counted by predicted class."""
    relative = str(unit["path"]).removeprefix(work.storage.root + "/")
    table = pq.read_table(io.BytesIO(work.storage.read_bytes(relative)), columns=["key", "feature"])
    chosen = pc.is_in(table["key"], value_set=work.keys[unit["source"]])
    features = matrix(table.filter(chosen)["feature"])
    predicted = work.predictor.predicted(work.predictor.similarity(features))
    return ClassCounts.from_batch(predicted, len(work.predictor.class_names))
