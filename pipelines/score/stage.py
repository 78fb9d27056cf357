"""Every head judges every image by every score: Ray Data over the feature shards.

The unit of work is one feature shard. Its scores are written before the next begins, one file a
head, whole or not at all, so a restart skips what is done:

    runs/RUN/scores/METHOD-SEED/SOURCE-00000.parquet    columns: see `pipelines.data.schema`
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data.benchmarks import Benchmark, role
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.schema import matrix
from pipelines.data.storage import Storage
from pipelines.finetune.cache import load_predictor
from pipelines.heads.base import LOCAL
from pipelines.score import by_name as scoring
from pipelines.score.cache import load_records
from pipelines.score.judge import judge

SCORED_ROLES = ("validation", "test", "validation_ood", "shifted", "ood")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeadScores:
    """A trained head and the parameters of the scores that judge by it."""

    name: str  # METHOD-SEED
    address: str
    scores: Mapping[str, Mapping[str, float]]
    records: Mapping[str, str] = field(default_factory=dict)  # addresses of what was fitted


@dataclass(frozen=True)
class _Members:
    """Which keys of one source are scored, sorted, with their set and label."""

    keys: pa.Array
    sets: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class _Work:
    """What every task needs; put once into Ray's object store."""

    storage: Storage
    run: str
    heads: tuple[HeadScores, ...]
    members: Mapping[str, _Members]
    set_names: tuple[str, ...]


def run(
    heads: Sequence[HeadScores],
    sets: FeatureSets,
    storage: Storage,
    run_id: str,
    *,
    at_once: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Write the scores of all heads; returns the folder of each head below `scores/`.

    Args:
        heads: what judges, each with a name of its own.
        sets: the benchmark's features.
        storage: where the run lies.
        run_id: the run.
        at_once: tasks at a time; by default as many as Ray has CPUs for.
        on_progress: called with (shards done, in all).
    """
    names = tuple(n for n in sets.benchmark.sets if role(n) in SCORED_ROLES)
    members = _members(sets.benchmark, names)
    units = [
        {"source": source, "number": number, "path": path}
        for source, cache in sets.caches.items()
        if source in members
        for number, path in enumerate(cache.shards())
    ]
    work = _Work(storage, run_id, tuple(heads), members, names)
    missing = [unit for unit in units if not _is_done(work, unit)]
    done = len(units) - len(missing)
    if on_progress:
        on_progress(done, len(units))
    for _ in _scored(missing, work, at_once):
        done += 1
        if on_progress:
            on_progress(done, len(units))
    return [head.name for head in heads]


def read(storage: Storage, run_id: str, head: str) -> pa.Table:
    """All scores of one head, sorted by set and key."""
    folder = ("runs", run_id, "scores", head)
    parts = [
        storage.read_table(*folder, name)
        for name in storage.names(*folder)
        if name.endswith(".parquet")
    ]
    return pa.concat_tables(parts).sort_by([("set", "ascending"), ("key", "ascending")])


def _members(benchmark: Benchmark, names: Sequence[str]) -> dict[str, _Members]:
    rows: dict[str, list[tuple[str, int, int]]] = {}
    for number, name in enumerate(names):
        chosen = benchmark.sets[name]
        for source, key, label in zip(chosen.sources, chosen.keys, chosen.labels, strict=True):
            rows.setdefault(source, []).append((key, number, label))
    members = {}
    for source, found in rows.items():
        keys, numbers, labels = zip(*sorted(found), strict=True)
        members[source] = _Members(
            pa.array(keys, pa.string()), np.asarray(numbers), np.asarray(labels, dtype=np.int64)
        )
    return members


def _part(unit: Mapping[str, Any]) -> str:
    return f"{unit['source']}-{unit['number']:05d}.parquet"


def _is_done(work: _Work, unit: Mapping[str, Any]) -> bool:
    return all(
        work.storage.exists("runs", work.run, "scores", head.name, _part(unit))
        for head in work.heads
    )


def _scored(units: Sequence[Mapping[str, Any]], work: _Work, at_once: int | None) -> Any:
    """Runs the units as Ray Data tasks and yields as each is done."""
    if not units:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shared = ray.put(work)
    blocks = [pa.Table.from_pylist([dict(unit)]) for unit in units]
    task: Any = _score_shard  # takes a keyword more than map_batches' type knows
    dataset = ray.data.from_arrow(blocks).map_batches(
        task,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"shared": shared},
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=at_once),
    )
    yield from dataset.iter_rows()


def _score_shard(batch: Any, shared: Any) -> Any:
    import ray

    work: _Work = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    for unit in batch.to_pylist():
        score_shard(unit, work)
    return batch


def score_shard(unit: Mapping[str, Any], work: _Work) -> None:
    """Judge the images of one feature shard by every head and write one file a head."""
    storage, members = work.storage, work.members[unit["source"]]
    relative = str(unit["path"]).removeprefix(storage.root + "/")
    heads = [(head, load_predictor(storage, head.address)) for head in work.heads]
    patches = any(p.takes_local or scoring.reads_local(head.scores) for head, p in heads)
    names = ["key", "feature", *([LOCAL] if patches else [])]
    table = pq.read_table(io.BytesIO(storage.read_bytes(relative)), columns=names)
    place = pc.index_in(table["key"], value_set=members.keys).to_numpy()
    wanted = np.flatnonzero(~np.isnan(place.astype(np.float64)))
    rows = place[wanted].astype(np.int64)
    features = matrix(table["feature"])[wanted]
    local = None
    if patches:
        flat = matrix(table[LOCAL])[wanted]
        local = flat.reshape(len(flat), -1, features.shape[1])
    keys = table["key"].take(pa.array(wanted))
    set_names = pa.array(work.set_names, pa.string()).take(pa.array(members.sets[rows]))
    for head, predictor in heads:
        records = load_records(storage, head.records)
        judged = judge(predictor, head.scores, features, records, local)
        columns = {
            "set": set_names,
            "key": keys,
            "label": pa.array(members.labels[rows], pa.int64()),
            **{name: pa.array(values) for name, values in judged.items()},
        }
        storage.write_table(pa.table(columns), "runs", work.run, "scores", head.name, _part(unit))
