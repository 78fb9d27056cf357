"""Every head judges every image by every score: one pass over the feature shards.

The unit of work is one feature shard. Its scores are written before the next begins, one file a
table, whole or not at all, so a restart skips what is done. A table's address is a digest of all
that decides it: the head, the scores with their parameters and fitted records, the images with
their features, and the code. So heads that share all of these share a table, and no table holds
rows of two versions of the code.

    cache/scores/ADDRESS/SOURCE-00000.parquet   columns: see `pipelines.data.schema`
    cache/scores/ADDRESS/manifest.json          written last: the parts, their rows and seals

A part is sealed when it is written: a restart counts it only as it was.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.compute.shard_map import map_shards
from pipelines.config import UserError, digest
from pipelines.data import kept
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.features import FeatureCache
from pipelines.data.kept import Damaged, Entry, FileSeal
from pipelines.data.members import SetMembers, ShardRows, SourceShard
from pipelines.data.storage import Storage
from pipelines.finetune.cache import load_predictor
from pipelines.records import HeadKey, Role
from pipelines.score import by_name as scoring
from pipelines.score.cache import load_records
from pipelines.score.code import score_code
from pipelines.score.judge import judge
from pipelines.score.result import HeadScores, ScoredHead, ScoreResult, ScoreTable

FOLDER = ("cache", "scores")
SCORED_ROLES: tuple[Role, ...] = (
    "validation", "test", "validation_ood", "validation_shifted", "shifted", "ood",
)  # fmt: skip

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Work:
    """What every task needs: heads by the address of their table, and which rows are scored."""

    storage: Storage
    heads: Mapping[str, HeadScores]
    members: SetMembers


def run(
    heads: Sequence[HeadScores],
    sets: FeatureSets,
    storage: Storage,
    *,
    with_ray: bool = True,
    at_once: int | None = None,
    on_progress: Progress | None = None,
) -> ScoreResult:
    """Score every image of the roles in `SCORED_ROLES` by every head, where that is missing.

    Args:
        heads: what judges; every key once.
        sets: the benchmark's features.
        storage: where heads, records and tables are kept.
        with_ray: Ray Data tasks; else a loop in this process, with the same result.
        at_once: tasks at a time; by default as many as Ray has CPUs for.
        on_progress: called with (shards done, in all).

    Raises:
        Damaged: where a shard of features, a head or a fitted record is not as it was written.
        UserError: where an image has no feature and no reason.
    """
    members = sets.members(*sets.names(*SCORED_ROLES))
    addresses = [address(head, sets, storage) for head in heads]
    missing = {
        place: head
        for place, head in zip(addresses, heads, strict=True)
        if entry(storage, place).find() is None
    }
    _fill(_Work(storage, missing, members), with_ray, at_once, on_progress)
    tables = {place: entry(storage, place).read() for place in addresses}
    return ScoreResult(
        heads=tuple(
            ScoredHead(key=head.key, address=place, rows=tables[place].rows)
            for head, place in zip(heads, addresses, strict=True)
        )
    )


def address(head: HeadScores, sets: FeatureSets, storage: Storage) -> str:
    """Where the table of a head lies below `cache/scores/`."""
    file = load_predictor(storage, head.address).head
    return digest(
        {
            "head": head.address,
            "scores": head.scores,
            "fitted": head.fitted,
            "passes": head.passes,
            "sets": sets.address(sets.names(*SCORED_ROLES)),
            "code": score_code(file, head.scores, score_shard).digest,
        }
    )


def entry(storage: Storage, place: str) -> Entry[ScoreTable]:
    """The folder of the table of scores at that address."""
    return Entry(storage, (*FOLDER, place), ScoreTable)


def read(storage: Storage, place: str) -> pa.Table:
    """The table of scores at that address, sorted by set and key.

    Raises:
        Damaged: where a part is missing, or the rows are not those that were scored.
    """
    folder = entry(storage, place)
    table, files = folder.read_all(list(folder.read().parts))
    parts = [pq.read_table(io.BytesIO(content)) for content in files.values()]
    rows = sum(part.num_rows for part in parts)
    if rows != table.rows:
        why = f"{rows} rows, and {table.rows} images were scored"
        raise Damaged(storage.path(*folder.folder), why, [folder.place])
    return pa.concat_tables(parts).sort_by([("set", "ascending"), ("key", "ascending")])


def read_all(storage: Storage, result: ScoreResult) -> dict[HeadKey, pa.Table]:
    """The tables of all heads; raises what `read` raises."""
    tables = {place: read(storage, place) for place in {head.address for head in result.heads}}
    return {head.key: tables[head.address] for head in result.heads}


def read_one(storage: Storage, result: ScoreResult, key: HeadKey) -> pa.Table:
    """The table of one head; raises what `read` raises."""
    return read(storage, next(head.address for head in result.heads if head.key == key))


def read_chosen(storage: Storage, result: ScoreResult) -> dict[tuple[str, int], pa.Table]:
    """The tables of the heads of chosen settings by (method, seed); raises what `read` raises."""
    return {
        (head.key.method, head.key.seed): read(storage, head.address)
        for head in result.heads
        if head.key.variant == "chosen"
    }


@dataclass(frozen=True)
class Part:
    """What one feature shard gives a table: rows, and the seal of their file."""

    rows: int
    seal: FileSeal


def score_shard(shard: SourceShard, work: _Work) -> dict[str, Part]:
    """Judge the images of one feature shard by every head whose part is not there yet.

    Gives the shard's part in each table, by address.
    """
    storage, name = work.storage, _part(shard)
    known = {place: _find_part(storage, place, name) for place in work.heads}
    heads = {
        place: (head, load_predictor(storage, head.address))
        for place, head in work.heads.items()
        if known[place] is None
    }
    parts = {place: part for place, part in known.items() if part is not None}
    if not heads:
        return parts
    local = any(p.takes_local or scoring.reads_local(head.scores) for head, p in heads.values())
    rows = work.members.read(shard, local=local)
    about = _about(rows, work.members)
    for place, (head, predictor) in heads.items():
        records = load_records(storage, head.fitted)
        passes = _passes(head, shard.source, rows, storage)
        columns = judge(predictor, head.scores, rows.features, records, rows.local, passes)
        arrays = {name: pa.array(values) for name, values in columns.items()}
        kept.write_table(storage, pa.table({**about, **arrays}), *FOLDER, place, name)
        parts[place] = _read_part(storage, place, name)
    return parts


def _passes(
    head: HeadScores, source: str, rows: ShardRows, storage: Storage
) -> dict[str, NDArray[np.float32]]:
    """The features of the shard's images after the input step of each score that takes one."""
    keys = rows.keys.to_pylist()
    return {
        score: FeatureCache(storage, addresses[source]).load(keys)
        for score, addresses in head.passes.items()
        if keys
    }


def _find_part(storage: Storage, place: str, name: str) -> Part | None:
    """A part that is there already, if there is one; a damaged one is removed."""
    if not storage.exists(*FOLDER, place, name):
        return None
    try:
        return _read_part(storage, place, name)
    except Damaged as damaged:
        kept.discard(storage, damaged)
        return None


def _read_part(storage: Storage, place: str, name: str) -> Part:
    content = kept.read_bytes(storage, *FOLDER, place, name)
    table = kept.open_table(storage, content, *FOLDER, place, name)
    return Part(table.num_rows, FileSeal.of(content))


def _fill(work: _Work, with_ray: bool, at_once: int | None, on_progress: Progress | None) -> None:
    """Write the parts that are missing, then the manifest of each table."""
    shards = work.members.shards()
    parts: dict[str, dict[str, Part]] = {place: {} for place in work.heads}
    if on_progress:
        on_progress(0 if work.heads else len(shards), len(shards))
    if not work.heads:
        return
    results = map_shards(score_shard, shards, work, with_ray=with_ray, at_once=at_once)
    for number, (shard, made) in enumerate(zip(shards, results, strict=True), start=1):
        for place, part in made.items():
            parts[place][_part(shard)] = part
        if on_progress:
            on_progress(number, len(shards))
    for place, of_table in parts.items():
        _finish(work, place, of_table)


def _finish(work: _Work, place: str, parts: Mapping[str, Part]) -> None:
    """Write a table's manifest, where every image that has a feature is in it."""
    rows, planned = sum(part.rows for part in parts.values()), work.members.num_rows()
    if rows != planned:
        raise UserError(
            f"scores {place}: {rows} images were scored, and {planned} have a feature; delete "
            f"{work.storage.path(*FOLDER, place)} and give the same command again"
        )
    counts = {name: part.rows for name, part in parts.items()}
    table = ScoreTable(address=place, rows=rows, parts=counts)
    entry(work.storage, place).write(table, there={n: part.seal for n, part in parts.items()})


def _about(rows: ShardRows, members: SetMembers) -> dict[str, pa.Array]:
    """The columns that do not depend on a head."""
    return {
        "set": pa.array(members.names, pa.string()).take(pa.array(rows.sets)),
        "key": rows.keys,
        "label": pa.array(rows.labels, pa.int64()),
    }


def _part(shard: SourceShard) -> str:
    return f"{shard.source}-{shard.number:05d}.parquet"
