"""Every head judges every image by every score: one pass over the feature shards.

The unit of work is one feature shard. Its scores are written before the next begins, one file a
table, whole or not at all, so a restart skips what is done. A table's address is a digest of all
that decides it: the head, the scores with their parameters and fitted records, the images with
their features, and the code. So heads that share all of these share a table, and no table holds
rows of two versions of the code.

    cache/scores/ADDRESS/SOURCE-00000.parquet   columns: see `pipelines.data.schema`
    cache/scores/ADDRESS/manifest.json          written last: the parts and their rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines.compute.shard_map import map_shards
from pipelines.config import UserError, digest
from pipelines.data.feature_sets import FeatureSets
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
SCORED_ROLES: tuple[Role, ...] = ("validation", "test", "validation_ood", "shifted", "ood")

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
        UserError: where a shard of features is damaged, or an image has no feature and no reason.
    """
    members = sets.members(*sets.names(*SCORED_ROLES))
    addresses = [address(head, sets, storage) for head in heads]
    missing = {
        place: head
        for place, head in zip(addresses, heads, strict=True)
        if not storage.exists(*FOLDER, place, "manifest.json")
    }
    _fill(_Work(storage, missing, members), with_ray, at_once, on_progress)
    tables = {place: _manifest(storage, place) for place in addresses}
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
            "sets": sets.address(sets.names(*SCORED_ROLES)),
            "code": score_code(file, head.scores, score_shard).digest,
        }
    )


def read(storage: Storage, place: str) -> pa.Table:
    """The table of scores at that address, sorted by set and key.

    Raises:
        UserError: where a part is missing, or the rows are not those that were scored.
    """
    table = _manifest(storage, place)
    there = set(storage.names(*FOLDER, place))
    if lost := [part for part in table.parts if part not in there]:
        raise UserError(
            f"scores {place}: {len(lost)} of {len(table.parts)} parts are missing (first: "
            f"{lost[0]}); {_remedy(storage, place)}"
        )
    parts = [storage.read_table(*FOLDER, place, part) for part in table.parts]
    rows = sum(part.num_rows for part in parts)
    if rows != table.rows:
        raise UserError(
            f"scores {place}: {rows} rows, and {table.rows} images were scored; "
            f"{_remedy(storage, place)}"
        )
    return pa.concat_tables(parts).sort_by([("set", "ascending"), ("key", "ascending")])


def read_all(storage: Storage, result: ScoreResult) -> dict[HeadKey, pa.Table]:
    """The tables of all heads; raises what `read` raises."""
    tables = {place: read(storage, place) for place in {head.address for head in result.heads}}
    return {head.key: tables[head.address] for head in result.heads}


def read_chosen(storage: Storage, result: ScoreResult) -> dict[tuple[str, int], pa.Table]:
    """The tables of the heads of chosen settings by (method, seed); raises what `read` raises."""
    return {
        (head.key.method, head.key.seed): read(storage, head.address)
        for head in result.heads
        if head.key.variant == "chosen"
    }


def score_shard(shard: SourceShard, work: _Work) -> dict[str, int]:
    """Judge the images of one feature shard by every head whose part is not there yet.

    Gives the rows of the shard's part in each table, by address.
    """
    storage, part = work.storage, _part(shard)
    there = [place for place in work.heads if storage.exists(*FOLDER, place, part)]
    heads = {
        place: (head, load_predictor(storage, head.address))
        for place, head in work.heads.items()
        if place not in there
    }
    counts = {p: storage.read_table(*FOLDER, p, part, columns=["key"]).num_rows for p in there}
    if not heads:
        return counts
    local = any(p.takes_local or scoring.reads_local(head.scores) for head, p in heads.values())
    rows = work.members.read(shard, local=local)
    about = _about(rows, work.members)
    for place, (head, predictor) in heads.items():
        records = load_records(storage, head.fitted)
        columns = judge(predictor, head.scores, rows.features, records, rows.local)
        arrays = {name: pa.array(values) for name, values in columns.items()}
        storage.write_table(pa.table({**about, **arrays}), *FOLDER, place, part)
        counts[place] = len(rows.keys)
    return counts


def _fill(work: _Work, with_ray: bool, at_once: int | None, on_progress: Progress | None) -> None:
    """Write the parts that are missing, then the manifest of each table."""
    shards = work.members.shards()
    parts: dict[str, dict[str, int]] = {place: {} for place in work.heads}
    if on_progress:
        on_progress(0 if work.heads else len(shards), len(shards))
    if not work.heads:
        return
    results = map_shards(score_shard, shards, work, with_ray=with_ray, at_once=at_once)
    for number, (shard, counts) in enumerate(zip(shards, results, strict=True), start=1):
        for place, rows in counts.items():
            parts[place][_part(shard)] = rows
        if on_progress:
            on_progress(number, len(shards))
    for place, counted in parts.items():
        _finish(work, place, counted)


def _finish(work: _Work, place: str, parts: Mapping[str, int]) -> None:
    """Write a table's manifest, where every image that has a feature is in it."""
    rows, planned = sum(parts.values()), work.members.num_rows()
    if rows != planned:
        raise UserError(
            f"scores {place}: {rows} images were scored, and {planned} have a feature; delete "
            f"{work.storage.path(*FOLDER, place)} and the features, and run embed again"
        )
    table = ScoreTable(address=place, rows=rows, parts=dict(parts))
    work.storage.write_bytes(table.to_json(), *FOLDER, place, "manifest.json")


def _about(rows: ShardRows, members: SetMembers) -> dict[str, pa.Array]:
    """The columns that do not depend on a head."""
    return {
        "set": pa.array(members.names, pa.string()).take(pa.array(rows.sets)),
        "key": rows.keys,
        "label": pa.array(rows.labels, pa.int64()),
    }


def _part(shard: SourceShard) -> str:
    return f"{shard.source}-{shard.number:05d}.parquet"


def _manifest(storage: Storage, place: str) -> ScoreTable:
    parts = (*FOLDER, place, "manifest.json")
    if not storage.exists(*parts):
        raise UserError(f"scores {place}: not there or not finished; run score again")
    return ScoreTable.from_json(storage.read_bytes(*parts), storage.path(*parts))


def _remedy(storage: Storage, place: str) -> str:
    return f"delete {storage.path(*FOLDER, place)} and run score again"
