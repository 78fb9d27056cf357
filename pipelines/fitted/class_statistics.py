"""Class means and scatter of a set's features: one reduction over the feature shards.

A task reads one shard and returns the statistics of the set's rows in it; the driver merges them
in the order of the shards, whatever order they come in, so that Ray Data and a plain loop give
the same bits. No task holds more than a shard, and the driver no more than what waits its turn.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.numpy

from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.schema import matrix
from pipelines.data.storage import Storage
from pipelines.ood.statistics import ClassStatistics


@dataclass(frozen=True)
class _Work:
    """What every task needs; put once into Ray's object store."""

    storage: Storage
    num_classes: int
    members: Mapping[str, tuple[pa.Array, pa.Array]]  # by source: keys and their labels


def reduce_shards(sets: FeatureSets, name: str, *, with_ray: bool) -> ClassStatistics:
    """Statistics of the set `name`, its features at unit length.

    Args:
        sets: a view that may open the set.
        name: of the set; its labels are classes.
        with_ray: Ray Data tasks; else a loop in this process, with the same result.

    Raises:
        PermissionError: where the view may not open the set.
        UserError: where none of its images could be read.
    """
    storage = next(iter(sets.caches.values())).storage  # one storage holds all features of a run
    work = _Work(storage, len(sets.benchmark.class_names), _members(sets, name))
    paths = [(source, path) for source in work.members for path in sets.caches[source].shards()]
    units = [{"number": n, "source": s, "path": p} for n, (s, p) in enumerate(paths)]
    found = _with_ray(units, work) if with_ray else (_reduced(unit, work) for unit in units)
    statistics = functools.reduce(ClassStatistics.merge, _in_order(found))
    if not statistics.num_samples:
        raise UserError(f"set {name!r}: none of its images could be read")
    return statistics


def _members(sets: FeatureSets, name: str) -> dict[str, tuple[pa.Array, pa.Array]]:
    if sets.roles is not None and name.partition("/")[0] not in sets.roles:
        raise PermissionError(f"{name!r} is test data: only score and evaluate may open it")
    chosen = sets.benchmark.sets[name]
    rows: dict[str, tuple[list[str], list[int]]] = {}
    for source, key, label in zip(chosen.sources, chosen.keys, chosen.labels, strict=True):
        keys, labels = rows.setdefault(source, ([], []))
        keys.append(key)
        labels.append(label)
    return {
        source: (pa.array(keys, pa.string()), pa.array(labels, pa.int64()))
        for source, (keys, labels) in rows.items()
    }


def _with_ray(units: list[dict[str, Any]], work: _Work) -> Iterator[tuple[int, ClassStatistics]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    task: Any = _reduce_batch  # takes a keyword more than map_batches' type knows
    dataset = ray.data.from_arrow([pa.Table.from_pylist([unit]) for unit in units]).map_batches(
        task,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"shared": ray.put(work)},
        num_cpus=1,
    )
    for row in dataset.iter_rows():
        arrays = safetensors.numpy.load(row["statistics"])
        yield row["number"], ClassStatistics(**arrays, normalized=True)


def _reduce_batch(batch: Any, shared: Any) -> Any:
    import ray

    work: _Work = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    numbers, contents = [], []
    for unit in batch.to_pylist():
        number, found = _reduced(unit, work)
        arrays = {"counts": found.counts, "means": found.means, "scatter": found.scatter}
        numbers.append(number)
        contents.append(safetensors.numpy.save(arrays))
    return pa.table({"number": numbers, "statistics": pa.array(contents, pa.large_binary())})


def _reduced(unit: Mapping[str, Any], work: _Work) -> tuple[int, ClassStatistics]:
    """The number of a shard, and the statistics of the set's rows in it."""
    relative = str(unit["path"]).removeprefix(work.storage.root + "/")
    table = pq.read_table(io.BytesIO(work.storage.read_bytes(relative)), columns=["key", "feature"])
    keys, labels = work.members[unit["source"]]
    place = pc.index_in(table["key"], value_set=keys).combine_chunks()
    wanted = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    own = labels.take(place.take(pa.array(wanted))).to_numpy(zero_copy_only=False)
    features = matrix(table["feature"])[wanted]
    return int(unit["number"]), ClassStatistics.from_batch(
        features, own, num_classes=work.num_classes, normalize=True
    )


def _in_order(found: Iterable[tuple[int, ClassStatistics]]) -> Iterator[ClassStatistics]:
    """What comes, by its number."""
    waiting: dict[int, ClassStatistics] = {}
    turn = 0
    for number, statistics in found:
        waiting[number] = statistics
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1
