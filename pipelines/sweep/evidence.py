"""What a sweep's trials say: which setting mattered, what was traded for what, what is in doubt.

Pure functions of `SweepResult` and of the post-hoc surfaces of the chosen trials
(`pipelines.sweep.surfaces`). Everything is of validation data.

    measured = evidence(sweep, surfaces)      # runs/RUN/sweep/evidence.json
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from annotated_types import Ge, Le

from pipelines.methods import MethodConfig
from pipelines.ood.pareto import pareto_front
from pipelines.records import Record, StoredRecord
from pipelines.sweep import importance, surfaces
from pipelines.sweep.importance import Importance, is_number, spans_decades
from pipelines.sweep.result import SweepResult, Trial

# The outer part of a range that counts as its edge; a grid's ends always do.
EDGE = 0.05
# The least and the largest value that is possible; None: no bound.
Bounds: TypeAlias = tuple[float | None, float | None]
_UNBOUNDED: Bounds = (None, None)
# Of scores' parameters that are counted from 1: nothing lies below.
_PARAMETER_BOUNDS: Mapping[str, Bounds] = {"c": (1.0, None), "k": (1.0, None)}


class ParetoPoint(Record):
    """A trial's ID accuracy and FPR under its method's selection criterion.

    Attributes:
        method, trial: which one.
        accuracy, fpr: in [0, 1].
        front: whether no other trial beats it in one without losing in the other.
    """

    method: str
    trial: int
    accuracy: float
    fpr: float
    front: bool


class Edge(Record):
    """A chosen value at the edge of what was tried, so that a better one may lie beyond.

    Attributes:
        method: whose.
        score: whose parameter it is, empty for a training setting.
        key, value: what was chosen.
        low, high: the range that was tried.
        is_criterion: whether the score is the method's selection criterion (True for a training
            setting).
        sentence: the warning.
    """

    method: str
    score: str
    key: str
    value: float
    low: float
    high: float
    is_criterion: bool
    sentence: str


class FailureReason(Record):
    """Why trials failed, and how many of them."""

    reason: str
    trials: int


class TrialCounts(Record):
    """How the trials of a method ended, their seconds, and reasons, the most frequent first."""

    method: str
    done: int
    stopped: int
    failed: int
    seconds: float
    reasons: tuple[FailureReason, ...] = ()


class Evidence(StoredRecord):
    """The content of `evidence.json`."""

    importance: tuple[Importance, ...]
    pareto: tuple[ParetoPoint, ...]
    edges: tuple[Edge, ...]
    budget: tuple[TrialCounts, ...]


def evidence(sweep: SweepResult, table: pa.Table | None = None) -> Evidence:
    """Importance, Pareto front, edges and budget of a sweep.

    Args:
        sweep: its result.
        table: the surfaces of the chosen trials; None where there are none.
    """
    measured = []
    for method, chosen in sweep.methods.items():
        measured.append(importance.of_training(sweep.of(method), chosen.setting.score))
        measured.append(criterion_surface(sweep, table, method))
    return Evidence(
        importance=tuple(one for one in measured if one is not None),
        pareto=pareto(sweep),
        edges=tuple(edges(sweep, table)),
        budget=budget(sweep.trials),
    )


def criterion_surface(sweep: SweepResult, table: pa.Table | None, method: str) -> Importance | None:
    """What the parameters of a method's selection criterion explain under its chosen head."""
    if table is None:
        return None
    rows = surfaces.of_score(table, method, sweep.methods[method].setting.score)
    return importance.of_surface(rows, surfaces.parameters(table))


def pareto(sweep: SweepResult) -> tuple[ParetoPoint, ...]:
    """ID accuracy (high) against FPR (low) of every trial that has both."""
    known = [
        (trial, trial.accuracy, figures.fpr)
        for trial in sweep.trials
        if trial.accuracy is not None
        and (figures := trial.by(sweep.methods[trial.method].setting.score))
    ]
    places = np.array([(accuracy, fpr) for _, accuracy, fpr in known]).reshape(-1, 2)
    on_front = pareto_front(places, maximised=(True, False))
    return tuple(
        ParetoPoint(method=t.method, trial=t.trial, accuracy=a, fpr=fpr, front=bool(front))
        for (t, a, fpr), front in zip(known, on_front, strict=True)
    )


def edges(sweep: SweepResult, table: pa.Table | None = None) -> Iterator[Edge]:
    """The chosen values that stand at the edge of what was tried.

    A range is what the trials (or the surface) really tried; of fewer than three values every one
    is an edge, so nothing is said of them. Neither is where a wider space is impossible.
    """
    for method, choice in sweep.methods.items():
        for key, value in choice.chosen.items():
            tried = [trial.settings.get(key) for trial in sweep.of(method)]
            if is_number(value) and (ends := _at_edge(value, tried, bounds(choice.setting, key))):
                yield _edge(method, "", key, (value, *ends), is_criterion=True)
        for score, params in choice.scores.items():
            rows = surfaces.of_score(table, method, score)
            is_criterion = score == choice.setting.score
            for key, value in params.items():
                limits = _PARAMETER_BOUNDS.get(key, _UNBOUNDED)
                if ends := _at_edge(value, [row.get(key) for row in rows], limits):
                    yield _edge(method, score, key, (value, *ends), is_criterion=is_criterion)


def _edge(
    method: str, score: str, key: str, values: tuple[float, float, float], *, is_criterion: bool
) -> Edge:
    """The edge at the first of `values`, of a range between the other two."""
    value, low, high = values
    of = f"{method} + {score}" if score else method
    return Edge(
        method=method,
        score=score,
        key=key,
        value=value,
        low=low,
        high=high,
        is_criterion=is_criterion,
        sentence=f"{of}: the best value of {key} ({value:g}) is at the edge of its space "
        f"({low:g} to {high:g}); a wider one may hold a better",
    )


def _at_edge(value: float, tried: Sequence[object], limits: Bounds) -> tuple[float, float] | None:
    """The range that was tried, where the value stands at an end of it that could be moved."""
    numbers = sorted({float(v) for v in tried if is_number(v)})
    if len(numbers) < 3:
        return None
    low, high = numbers[0], numbers[-1]
    scale = math.log if spans_decades(numbers) else float
    place = (scale(value) - scale(low)) / (scale(high) - scale(low))
    least, largest = limits
    below = place <= EDGE and (least is None or value > least)
    above = place >= 1 - EDGE and (largest is None or value < largest)
    return (low, high) if below or above else None


def bounds(setting: MethodConfig, key: str) -> Bounds:
    """The least and the largest value of a key that a method's configuration allows.

    Keys of its sections (with a dot) count as unbounded: few of them are bounded.
    """
    info = type(setting).model_fields.get(key)
    marks = info.metadata if info is not None else []
    least = [m.ge for m in marks if isinstance(m, Ge) and is_number(m.ge)]
    largest = [m.le for m in marks if isinstance(m, Le) and is_number(m.le)]
    return next(map(float, least), None), next(map(float, largest), None)


def budget(trials: Sequence[Trial]) -> tuple[TrialCounts, ...]:
    """How the trials of each method ended."""
    methods = dict.fromkeys(trial.method for trial in trials)
    return tuple(_counts(m, [t for t in trials if t.method == m]) for m in methods)


def _counts(method: str, trials: Sequence[Trial]) -> TrialCounts:
    ended = Counter(trial.status for trial in trials)
    reasons = Counter(t.reason or "no reason given" for t in trials if t.status == "failed")
    return TrialCounts(
        method=method,
        done=ended["done"],
        stopped=ended["stopped"],
        failed=ended["failed"],
        seconds=round(sum(trial.seconds for trial in trials), 3),
        reasons=tuple(FailureReason(reason=r, trials=n) for r, n in reasons.most_common()),
    )
