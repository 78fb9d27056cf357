"""Scores in, evidence out: the one place where test scores become numbers.

The threshold of a score is set on ID validation (the `target_tpr` quantile); test data only
report what it gives. Groups (near, far) are unweighted means over their sets. Differences
between scores are judged by a paired bootstrap over the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipelines.config import Section, UserError
from pipelines.ood import ood_metrics, paired_delta_interval, threshold_at_tpr
from pipelines.records import SetName

# The two cells of Zhu 2025's main table that this project's demo always shows.
SEED_CELLS = {
    ("coop", "mcm"): "Zhu 2025: CoOp + MCM",
    ("ebm", "delta_energy"): "Zhu 2025: EBM + DeltaEnergy",
}
FIGURES = {"auroc": "auroc", "fpr": "fpr_at_tpr", "aupr_id": "aupr_id", "aupr_ood": "aupr_ood"}
CALIBRATION_BINS = 15

Progress = Callable[[int, int], None]


class EvaluateConfig(Section):
    """How sure the tables are."""

    num_resamples: int = Field(1000, ge=100, description="bootstrap resamples of an interval")


@dataclass(frozen=True)
class Scored:
    """The scores of one head (one method, one seed)."""

    table: pa.Table

    @cached_property
    def sets(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Columns as arrays, by set."""
        names = np.asarray(self.table["set"].to_pylist(), dtype=object)
        columns = {c: self.table[c].to_numpy() for c in self.table.column_names if c != "set"}
        return {n: {c: v[names == n] for c, v in columns.items()} for n in sorted(set(names))}

    def scores(self, score: str, *names: str) -> NDArray[np.float64]:
        """The scores of these sets, one set after the other."""
        return np.concatenate([self.sets[name][f"score_{score}"] for name in names])

    def accuracy(self, name: str) -> float:
        """The share of the set's images whose predicted class is their label."""
        chosen = self.sets[name]
        return float((chosen["predicted"] == chosen["label"]).mean())


def run(
    tables: Mapping[tuple[str, int], pa.Table],
    sweep: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    target_tpr: float,
    settings: EvaluateConfig,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """All figures of a run.

    Args:
        tables: scores by (method, seed).
        sweep: the content of `sweep.json`.
        facts: what else the result names: benchmark, backbone, class_names, notes, sets, rejected.
        target_tpr: of the threshold and of FPR.
        settings: the bootstrap.
        on_progress: called with (rows done, in all).

    Returns:
        The content of `metrics.json`; rates are fractions in [0, 1].

    Raises:
        UserError: where there is no set to put the threshold on, or none to judge it by.
    """
    scored = {place: Scored(table) for place, table in tables.items()}
    for needed, purpose in (("validation", "set the threshold on"), ("test", "judge")):
        if any(needed not in head.sets for head in scored.values()):
            raise UserError(f"the benchmark has no set {needed!r} to {purpose}")
    methods = list(dict.fromkeys(method for method, _ in scored))
    rows: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    total = len(methods) * len(next(iter(sweep["methods"].values()))["scores"])
    for method in methods:
        heads = [head for (name, _), head in sorted(scored.items()) if name == method]
        chosen = sweep["methods"][method]["scores"]
        for score, params in chosen.items():
            rows.append(_row(method, score, params, heads, target_tpr, settings))
            if on_progress:
                on_progress(len(rows), total)
        paired += _paired_scores(method, list(chosen), heads, settings)
    return {
        **facts,
        "target_tpr": target_tpr,
        "seeds": sorted({seed for _, seed in scored}),
        "criterion": sweep["criterion"],
        "rows": rows,
        "paired": paired,
        **_gains(rows, scored, settings),
    }


def groups(sets: Sequence[str]) -> dict[str, list[str]]:
    """The OOD sets by group (ood/GROUP/NAME), and all of them as `mean`."""
    ood = [name for name in sets if SetName.parse(name).role == "ood"]
    found: dict[str, list[str]] = {}
    for name in ood:
        found.setdefault(SetName.parse(name).group, []).append(name)
    return {**found, "mean": ood}


def _row(
    method: str,
    score: str,
    params: Mapping[str, float],
    heads: Sequence[Scored],
    target_tpr: float,
    settings: EvaluateConfig,
) -> dict[str, Any]:
    per_seed = [_figures(head, score, target_tpr) for head in heads]
    summary: dict[str, Any] = _summary(per_seed)
    summary["threshold"] = _threshold(heads[0].scores(score, "validation"), target_tpr, settings)
    return {
        "method": method,
        "score": score,
        "params": dict(params),
        "cell": SEED_CELLS.get((method, score), ""),
        **summary,
    }


def _figures(head: Scored, score: str, target_tpr: float) -> dict[str, Any]:
    """Every figure of one head and score, for one seed."""
    shifted = [name for name in head.sets if SetName.parse(name).role == "shifted"]
    id_scores = head.scores(score, "test")
    per_set = {
        name: ood_metrics(id_scores, head.scores(score, name), target_tpr)
        for name in groups(list(head.sets))["mean"]
    }
    threshold = threshold_at_tpr(head.scores(score, "validation"), target_tpr)
    figures: dict[str, Any] = {
        "id_accuracy": head.accuracy("test"),
        "shifted": {name: head.accuracy(name) for name in shifted},
        "ece": _calibration_error(head.sets["test"]),
        "sets": {n: {k: f[m] for k, m in FIGURES.items()} for n, f in per_set.items()},
        "tpr": {n: float((head.scores(score, n) >= threshold).mean()) for n in ("test", *shifted)},
        "validation_fpr": {
            name: float((head.scores(score, name) >= threshold).mean()) for name in per_set
        },
    }
    if shifted:
        figures["ood_accuracy"] = float(np.mean(list(figures["shifted"].values())))
    for figure, metric in FIGURES.items():
        figures[figure] = {
            group: float(np.mean([per_set[name][metric] for name in names]))
            for group, names in groups(list(head.sets)).items()
            if names
        }
    if per_set:
        everything = head.scores(score, "test", *shifted)
        full = [ood_metrics(everything, head.scores(score, n), target_tpr) for n in per_set]
        figures["full_spectrum"] = {
            "auroc": float(np.mean([f["auroc"] for f in full])),
            "fpr": float(np.mean([f["fpr_at_tpr"] for f in full])),
        }
    return figures


def _summary(per_seed: Sequence[Any]) -> Any:
    """Mean and sample standard deviation over seeds of every number in equal trees."""
    if isinstance(per_seed[0], dict):
        return {key: _summary([tree[key] for tree in per_seed]) for key in per_seed[0]}
    values = np.asarray(per_seed, dtype=np.float64)
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": std}


def _calibration_error(chosen: Mapping[str, NDArray[Any]]) -> float:
    """Expected calibration error of the confidence in the predicted class, equal-width bins."""
    confidence = chosen["confidence"]
    right = chosen["predicted"] == chosen["label"]
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1)
    gaps = [
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    ]
    return float(np.sum(gaps))


def _threshold(
    id_scores: NDArray[np.float64], target_tpr: float, settings: EvaluateConfig
) -> dict[str, Any]:
    """The threshold on ID validation with its 95 % bootstrap interval and sample size."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(id_scores), size=(settings.num_resamples, len(id_scores)))
    # The k-th largest of each resample, as `threshold_at_tpr` has it.
    rank = len(id_scores) - int(np.ceil(target_tpr * len(id_scores) - 1e-9))
    values = np.partition(id_scores[drawn], rank, axis=1)[:, rank]
    low, high = np.quantile(values, [0.025, 0.975])
    return {
        "value": threshold_at_tpr(id_scores, target_tpr),
        "low": float(low),
        "high": float(high),
        "num": len(id_scores),
    }


def _paired_scores(
    method: str, scores: Sequence[str], heads: Sequence[Scored], settings: EvaluateConfig
) -> list[dict[str, Any]]:
    """DeltaEnergy minus each other score under the same head, by OOD group."""
    if "delta_energy" not in scores:
        return []
    found = []
    for group, names in groups(list(heads[0].sets)).items():
        for other in scores:
            if other == "delta_energy" or not names:
                continue
            first = [_pair(head, "delta_energy", names) for head in heads]
            second = [_pair(head, other, names) for head in heads]
            for metric in ("auroc", "fpr"):
                difference = paired(metric, first, second, settings)
                found.append(
                    {
                        "method": method,
                        "group": group,
                        "metric": metric,
                        "a": "delta_energy",
                        "b": other,
                        **difference,
                    }
                )
    return found


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def _pair(head: Scored, score: str, names: Sequence[str]) -> Pair:
    return head.scores(score, "test"), head.scores(score, *names)


def paired(
    metric: str, first: Sequence[Pair], second: Sequence[Pair], settings: EvaluateConfig
) -> dict[str, float]:
    """Mean over seeds of first - second, with its 95 % paired bootstrap interval.

    The images of a group's sets are pooled. The ends of the interval are means of the ends of
    each seed's interval, which is wide rather than narrow: seeds do not cancel.
    """
    intervals = [
        paired_delta_interval(FIGURES[metric], a, b, num_resamples=settings.num_resamples)
        for a, b in zip(first, second, strict=True)
    ]
    return {
        "difference": float(np.mean([i.value for i in intervals])),
        "low": float(np.mean([i.low for i in intervals])),
        "high": float(np.mean([i.high for i in intervals])),
    }


def _gains(
    rows: Sequence[Mapping[str, Any]],
    scored: Mapping[tuple[str, int], Scored],
    settings: EvaluateConfig,
) -> dict[str, Any]:
    """What training gained and what the score gained on the way between the seed's two cells."""
    cells = {(row["method"], row["score"]) for row in rows}
    start, end = SEED_CELLS
    turn = (end[0], start[1])
    any_ood = any(groups(list(head.sets))["mean"] for head in scored.values())
    if not any_ood or not {start, end, turn} <= cells:
        return {"gains": {}, "sentence": ""}
    steps = {"training": (start, turn), "score": (turn, end), "both": (start, end)}
    gains = {}
    for name, (before, after) in steps.items():
        gains[name] = {
            metric: paired(
                metric, _cell(scored, after), _cell(scored, before), settings
            )
            for metric in ("auroc", "fpr")
        }  # fmt: skip
    return {"gains": gains, "sentence": _sentence(gains)}


def _cell(scored: Mapping[tuple[str, int], Scored], place: tuple[str, str]) -> list[Pair]:
    heads = [head for (method, _), head in sorted(scored.items()) if method == place[0]]
    return [_pair(h, place[1], groups(list(h.sets))["mean"]) for h in heads]


def _sentence(gains: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    def said(step: str) -> str:
        auroc, fpr = gains[step]["auroc"], gains[step]["fpr"]
        return f"AUROC {points(auroc)}, FPR {points(fpr)}"

    return (
        f"From CoOp + MCM to EBM + DeltaEnergy, all OOD images pooled, in points with 95 % "
        f"paired intervals: training (EBM for CoOp, MCM kept) changed {said('training')}; the "
        f"score (DeltaEnergy for MCM, EBM kept) changed {said('score')}; together "
        f"{said('both')}."
    )


def points(interval: Mapping[str, float]) -> str:
    """A difference in percentage points with its interval: +1.2 [+0.3, +2.1]."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(
        *(100 * interval[key] for key in ("difference", "low", "high"))
    )
