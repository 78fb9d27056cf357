"""The post-hoc surfaces of the chosen trials as one table, a row for each setting of a score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import pyarrow as pa

from pipelines.data import kept
from pipelines.data.storage import Storage
from pipelines.score import search as posthoc
from pipelines.sweep.trial_record import TrialRecord

FILE = "surfaces.parquet"
# Columns beside the parameters.
_PLACE = [("method", pa.string()), ("trial", pa.int64()), ("score", pa.string())]
_FIGURES = [("auroc", pa.float64()), ("fpr", pa.float64())]
Row: TypeAlias = dict[str, str | int | float | None]


def schema(scores: Sequence[str]) -> pa.Schema:
    """The columns of a table over these scores: one for every parameter that any of them has.

    A parameter that a score lacks is null in its rows; a sum's are written `energy.tau`.
    """
    names = dict.fromkeys(name for score in scores for name in posthoc.defaults(score, num_train=1))
    return pa.schema([*_PLACE, *((name, pa.float64()) for name in names), *_FIGURES])


def parameters(table: pa.Table) -> list[str]:
    """The names of the columns that are parameters."""
    others = {name for name, _ in (*_PLACE, *_FIGURES)}
    return [name for name in table.column_names if name not in others]


def table(chosen: Sequence[tuple[str, int, TrialRecord]], scores: Sequence[str]) -> pa.Table | None:
    """The table of the chosen trials; None where none of them searched a score's parameters.

    Args:
        chosen: name of the method, number and record of each trial.
        scores: those that were judged.
    """
    rows = [row for method, trial, record in chosen for row in _rows(method, trial, record)]
    if not rows:
        return None
    columns = schema(scores)
    unknown = {name for row in rows for name in row} - set(columns.names)
    assert not unknown, f"no score has the parameters {sorted(unknown)}"
    return pa.Table.from_pylist(rows, schema=columns)


def _rows(method: str, trial: int, record: TrialRecord) -> Iterator[Row]:
    for score, surface in record.surface.items():
        for place, (auroc, fpr) in enumerate(zip(surface.auroc, surface.fpr, strict=True)):
            params = {name: float(values[place]) for name, values in surface.params.items()}
            head: Row = {"method": method, "trial": trial, "score": score}
            yield {**head, **params, "auroc": auroc, "fpr": fpr}


def of_score(surfaces: pa.Table | None, method: str, score: str) -> list[Row]:
    """The settings of one score under a method's chosen trial."""
    if surfaces is None:
        return []
    return [r for r in surfaces.to_pylist() if (r["method"], r["score"]) == (method, score)]


def read_surfaces(storage: Storage, run: str) -> pa.Table | None:
    """The surfaces of a run, where its sweep wrote them.

    Raises:
        Damaged: where they are not as they were written.
    """
    place = ("runs", run, FILE)
    return kept.read_table(storage, *place) if storage.exists(*place) else None
