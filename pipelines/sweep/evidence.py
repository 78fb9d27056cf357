"""What a sweep's trials say: which setting mattered, what was traded for what, what is in doubt.

Pure functions of `sweep.json` and of the post-hoc surfaces of the chosen trials (columns method,
trial, score, tau, c, gamma, k, auroc, fpr; null where a score has no such parameter). Everything
is of validation data.

    found = sweep_evidence.evidence(sweep, surfaces)      # plain data: runs/RUN/sweep/evidence.json
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.methods import METHODS

# Fewer trials than these say nothing of a setting beside others that vary with it: each is one
# training, and chance is in all of them.
MIN_GRID = 8
MIN_SAMPLES = 16
MIN_SAMPLES_PER_SETTING = 6
# The outer part of a range that counts as its edge; a grid's ends always do.
EDGE = 0.05
# The parameters of scores that a surface may have.
PARAMETERS = ("tau", "c", "gamma", "k")
# Counted from 1: nothing lies below.
_LOWEST = {"c": 1.0, "k": 1.0}

GRID = (
    "share of the variance of validation AUROC over the whole grid that the value alone explains "
    "(main effect of a functional ANOVA)"
)
_GRID_NOTE = "what is missing to 100 % is how they act together, and chance"
FOREST = (
    "drop in R2 of a random forest on validation AUROC when a setting's values are shuffled, "
    "scaled to the share of variance that the forest predicts out of bag"
)


@dataclass(frozen=True)
class Trial:
    """One training of a sweep; a figure that is not known is None or absent.

    Attributes:
        method: its name in tables; number: of the trial, within the method.
        settings: dotted keys and values.
        status: stopped means early, by a scheduler.
        reason: why it failed or was stopped.
        accuracy: on ID validation.
        auroc, fpr, params: by score, on validation OOD, under the parameters that were best.
        seconds: how long it took.
    """

    method: str
    number: int
    settings: Mapping[str, Any]
    status: Literal["done", "stopped", "failed"] = "done"
    reason: str | None = None
    accuracy: float | None = None
    auroc: Mapping[str, float] = field(default_factory=dict)
    fpr: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, figures: Mapping[str, float], score: str) -> float | None:
        """The figure of `score`; where it was not judged, the mean over the scores that were."""
        if score in figures:
            return float(figures[score])
        return float(np.mean(list(figures.values()))) if figures else None


@dataclass(frozen=True)
class Importance:
    """How much of the change in validation AUROC each setting explains.

    Attributes:
        method: whose; of: `training settings`, or the score whose parameters these are.
        num: trials, or settings of the surface.
        how: what a share is; empty where there is none.
        shares: by setting, as fractions of the variance; they need not sum to 1.
        note: why there is none, or what to keep in mind.
    """

    method: str
    of: str
    num: int
    how: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Edge:
    """A chosen value at the edge of what was tried, so that a better one may lie beyond.

    Attributes:
        method: whose; score: whose parameter it is, empty for a training setting.
        key, value: what was chosen; low, high: the range that was tried.
        own: whether the score is the method's own (True for a training setting).
    """

    method: str
    score: str
    key: str
    value: float
    low: float
    high: float
    own: bool

    @property
    def sentence(self) -> str:
        """The warning."""
        of = f"{self.method} + {self.score}" if self.score else self.method
        return (
            f"{of}: the best value of {self.key} ({self.value:g}) is at the edge of its space "
            f"({self.low:g} to {self.high:g}); a wider one may hold a better"
        )


def trials(sweep: Mapping[str, Any]) -> list[Trial]:
    """The trials of `sweep.json`; one of an earlier version, without a status, is done."""
    return [
        Trial(
            method=entry["method"],
            number=int(entry["trial"]),
            settings=entry.get("settings") or {},
            status=entry.get("status") or "done",
            reason=entry.get("reason"),
            accuracy=entry.get("accuracy"),
            auroc=entry.get("auroc") or {},
            fpr=entry.get("fpr") or {},
            params=entry.get("params") or {},
            seconds=float(entry.get("seconds") or 0.0),
        )
        for entry in sweep.get("trials") or []
    ]


def own_scores(sweep: Mapping[str, Any]) -> dict[str, str]:
    """The score that each method is chosen by."""
    return {name: found["setting"]["score"] for name, found in sweep["methods"].items()}


def varied(members: Sequence[Trial]) -> list[str]:
    """The settings that have more than one value among these trials, in their own order."""
    keys = dict.fromkeys(key for trial in members for key in trial.settings)
    return [k for k in keys if len({str(t.settings.get(k)) for t in members}) > 1]


def is_number(value: Any) -> bool:
    """Whether a setting's value is a finite number (true and false are words)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether an axis of these values should be logarithmic: all positive, a decade apart."""
    return min(values) > 0 and max(values) / min(values) >= 10


def importance(members: Sequence[Trial], score: str) -> Importance | None:
    """What the training settings of one method explain; None where none of them varied.

    A full grid is taken apart exactly. Other samples (random, TPE) go through a random forest,
    and only if it predicts trials that it has not seen (Hutter et al. 2014, "An Efficient
    Approach for Assessing Hyperparameter Importance", make the case for forests here).

    Args:
        members: the trials of one method; only those that are done count.
        score: the one whose AUROC is explained.
    """
    known = [(t, t.of(t.auroc, score)) for t in members if t.status == "done"]
    done, values = [t for t, v in known if v is not None], [v for _, v in known if v is not None]
    keys = varied(done)
    if not keys:
        return None
    table = {key: [str(t.settings.get(key)) for t in done] for key in keys}
    method, of = done[0].method, "training settings"
    if len(keys) == 1:
        return Importance(method, of, len(done), note=_alone(keys[0]))
    whole = _is_grid(table)
    needed = MIN_GRID if whole else max(MIN_SAMPLES, MIN_SAMPLES_PER_SETTING * len(keys))
    if len(done) < needed:
        kind = "in a grid" if whole else "that are no grid"
        note = f"too few trials: {len(done)} are done, {len(keys)} settings {kind} need {needed}"
        return Importance(method, of, len(done), note=note)
    if whole:
        return Importance(method, of, len(done), GRID, _main_effects(table, values), _GRID_NOTE)
    columns = np.stack([_numbers([t.settings.get(key) for t in done]) for key in keys], axis=1)
    shares = _forest_shares(columns, np.asarray(values))
    if shares is None:
        note = "no forest predicts unseen trials better than their mean does: nothing to show"
        return Importance(method, of, len(done), note=note)
    return Importance(method, of, len(done), FOREST, dict(zip(keys, shares, strict=True)))


def surface_importance(rows: Sequence[Mapping[str, Any]]) -> Importance | None:
    """What the parameters of one score explain under the chosen head; None where none varied."""
    keys = _surface_keys(rows)
    table = {key: [str(row[key]) for row in rows] for key in keys}
    if not keys or not _is_grid(table):
        return None
    method, score = rows[0]["method"], rows[0]["score"]
    if len(keys) == 1:
        return Importance(method, score, len(rows), note=_alone(keys[0]))
    shares = _main_effects(table, [row["auroc"] for row in rows])
    return Importance(method, score, len(rows), GRID, shares, _GRID_NOTE)


def surface_rows(surfaces: pa.Table | None, method: str, score: str) -> list[dict[str, Any]]:
    """The surface of one score under a method's chosen trial."""
    if surfaces is None:
        return []
    return [r for r in surfaces.to_pylist() if (r["method"], r["score"]) == (method, score)]


def _surface_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        key
        for key in PARAMETERS
        if len({row.get(key) for row in rows if row.get(key) is not None}) > 1
    ]


def _is_grid(table: Mapping[str, Sequence[str]]) -> bool:
    """Whether every combination of the values stands there equally often."""
    counts = Counter(zip(*table.values(), strict=True))
    full = math.prod(len(set(column)) for column in table.values())
    return len(counts) == full and len(set(counts.values())) == 1


def _alone(key: str) -> str:
    return f"only {key} varied: there is nothing to weigh it against"


def _main_effects(table: Mapping[str, Sequence[str]], values: Sequence[float]) -> dict[str, float]:
    array = np.asarray(values)
    whole = array.var()
    shares = {}
    for key, column in table.items():
        groups = np.asarray(column)
        means = [array[groups == value].mean() for value in dict.fromkeys(column)]
        shares[key] = float(np.var(means) / whole) if whole > 0 else 0.0
    return shares


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """A column for a forest: numbers as they are, words by their place among them."""
    if all(map(is_number, values)):
        return np.asarray(values, dtype=np.float64)
    names = sorted({str(value) for value in values})
    return np.asarray([names.index(str(value)) for value in values], dtype=np.float64)


def _forest_shares(columns: NDArray[np.float64], values: NDArray[np.float64]) -> list[float] | None:
    from sklearn.ensemble import RandomForestRegressor  # half a second, needed by few runs
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(150, oob_score=True, random_state=0, n_jobs=1)
    forest.fit(columns, values)
    predicted = float(forest.oob_score_)
    if predicted <= 0:
        return None
    drops = permutation_importance(forest, columns, values, n_repeats=10, random_state=0, n_jobs=1)
    useful = np.clip(drops["importances_mean"], 0, None)
    if useful.sum() == 0:
        return None
    return [float(share) for share in predicted * useful / useful.sum()]


def pareto(members: Sequence[Trial], own: Mapping[str, str]) -> list[dict[str, Any]]:
    """ID accuracy (high) against FPR (low) of every trial that has both, under its own score.

    On the front are those that no other trial beats in one without losing in the other.
    """
    points: list[dict[str, Any]] = [
        {"method": t.method, "trial": t.number, "accuracy": t.accuracy, "fpr": fpr}
        for t in members
        if (fpr := t.of(t.fpr, own[t.method])) is not None and t.accuracy is not None
    ]
    for point in points:
        point["front"] = not any(
            other["accuracy"] >= point["accuracy"]
            and other["fpr"] <= point["fpr"]
            and (other["accuracy"], other["fpr"]) != (point["accuracy"], point["fpr"])
            for other in points
        )
    return points


def edges(sweep: Mapping[str, Any], surfaces: pa.Table | None = None) -> list[Edge]:
    """The chosen values that stand at the edge of what was tried.

    A range is what the trials (or the surface) really tried; of fewer than three values every one
    is an edge, so nothing is said of them. Neither is where a wider space is impossible.
    """
    found, members = [], trials(sweep)
    for name, chosen in sweep["methods"].items():
        own = chosen["setting"]["score"]
        for key, value in (chosen.get("chosen") or {}).items():
            tried = [t.settings.get(key) for t in members if t.method == name]
            allowed = _allowed(chosen["setting"], key)
            if (edge := _at_edge(value, tried, allowed)) is not None:
                found.append(Edge(name, "", key, value, *edge, own=True))
        for score, params in (chosen.get("scores") or {}).items():
            rows = surface_rows(surfaces, name, score)
            for key, value in (params or {}).items():
                tried = [row.get(key) for row in rows]
                allowed = _LOWEST.get(key), None
                if (edge := _at_edge(value, tried, allowed)) is not None:
                    found.append(Edge(name, score, key, value, *edge, own=score == own))
    return found


def _at_edge(
    value: Any, tried: Sequence[Any], allowed: tuple[float | None, float | None]
) -> tuple[float, float] | None:
    """The range that was tried, where the value stands at an end of it that could be moved."""
    numbers = sorted({float(v) for v in tried if is_number(v)})
    if not is_number(value) or len(numbers) < 3:
        return None
    low, high = numbers[0], numbers[-1]
    scale = math.log if spans_decades(numbers) else float
    place = (scale(value) - scale(low)) / (scale(high) - scale(low))
    below = place <= EDGE and (allowed[0] is None or value > allowed[0])
    above = place >= 1 - EDGE and (allowed[1] is None or value < allowed[1])
    return (low, high) if below or above else None


def _allowed(setting: Mapping[str, Any], key: str) -> tuple[float | None, float | None]:
    """The least and the largest value that a method's configuration allows, where it says."""
    model: Any = getattr(METHODS.get(setting.get("name", "")), "Config", None)
    if model is None or "." in key:
        return None, None  # sections are told apart by their content; few of their keys are bounded
    info = model.model_fields.get(key)
    ends = info.metadata if info is not None else []
    low = next((float(m.ge) for m in ends if hasattr(m, "ge")), None)
    high = next((float(m.le) for m in ends if hasattr(m, "le")), None)
    return low, high


def budget(members: Sequence[Trial]) -> list[dict[str, Any]]:
    """By method: trials by how they ended, their seconds, and reasons, the most frequent first."""
    found = []
    for method in dict.fromkeys(trial.method for trial in members):
        own = [trial for trial in members if trial.method == method]
        reasons = Counter(t.reason or "no reason given" for t in own if t.status == "failed")
        found.append(
            {
                "method": method,
                **{s: sum(t.status == s for t in own) for s in ("done", "stopped", "failed")},
                "seconds": round(sum(trial.seconds for trial in own), 3),
                "reasons": [{"reason": r, "trials": n} for r, n in reasons.most_common()],
            }
        )
    return found


def evidence(sweep: Mapping[str, Any], surfaces: pa.Table | None = None) -> dict[str, Any]:
    """Importance, Pareto front, edges and budget of a sweep as plain data.

    Args:
        sweep: the content of `sweep.json`.
        surfaces: of the chosen trials; None where there are none.
    """
    members, own = trials(sweep), own_scores(sweep)
    found = []
    for method, score in own.items():
        found.append(importance([t for t in members if t.method == method], score))
        found.append(surface_importance(surface_rows(surfaces, method, score)))
    return {
        "importance": [asdict(one) for one in found if one is not None],
        "pareto": pareto(members, own),
        "edges": [{**asdict(e), "sentence": e.sentence} for e in edges(sweep, surfaces)],
        "budget": budget(members),
    }
