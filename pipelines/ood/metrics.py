"""Metrics of OOD detection and of confidence, on scores that are HIGH for in-distribution (ID).

ID is the positive class unless a name or argument says otherwise. Scores are (N,) arrays or
tensors, judged in float64; metrics are floats in [0, 1]. Every one equals scikit-learn's curves,
ties included, and none returns a number for input it cannot judge: an empty side (one class
only), NaN or inf is a ValueError that says which. `METRICS`, at the foot, holds those that take
(id_scores, ood_scores); `ood_metrics` computes all of them in one pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np

from pipelines.ood import curves
from pipelines.ood.curves import Rule, Steps, sort_both, steps_of_counts, steps_of_sorted
from pipelines.ood.resampling import (
    Interval,
    PairMetric,
    Resampled,
    resampled_metrics,
    resampled_shares,
)
from pipelines.ood.sides import both_sides, check_some, correct_rows, one_side
from pipelines.ood.statistics import FloatArray, ScoreHistogram, Values

Convention: TypeAlias = Literal["first", "nearest", "percentile"]


@dataclass(frozen=True)
class Metric:
    """One row of `METRICS`; calling it calls `function(id_scores, ood_scores)`.

    `rule` computes the same from counts; `bound` is how far the value of binned scores can lie
    from that of the scores themselves.
    """

    function: PairMetric
    rule: Rule
    bound: Callable[[Steps], float]
    higher_is_better: bool

    def __call__(self, id_scores: Values, ood_scores: Values) -> float:
        """The metric of ID scores (N,) and OOD scores (M,)."""
        return self.function(id_scores, ood_scores)


@dataclass(frozen=True)
class Bounded:
    """A value and a bound: the exact metric lies within `value` +- `bound`."""

    value: float
    bound: float


def ood_metrics(id_scores: Values, ood_scores: Values, tpr: float = 0.95) -> dict[str, float]:
    """All of `METRICS` at once; each side is sorted once.

    Args:
        id_scores: (N,), higher means ID.
        ood_scores: (M,).
        tpr: Target of the FPR in both directions, in (0, 1].

    Returns:
        A value for each name in `METRICS`.

    Raises:
        ValueError: A side is empty or holds NaN or inf, or `tpr` is out of range.
    """
    rules = {name: row.rule for name, row in METRICS.items()}
    return _measured(rules, *both_sides(id_scores, ood_scores), tpr)


def histogram_metrics(
    id_scores: ScoreHistogram, ood_scores: ScoreHistogram, tpr: float = 0.95
) -> dict[str, Bounded]:
    """All of `METRICS` from two histograms, each with a bound on its distance to the exact value.

    The value treats the scores of a bin as equal. The bound is rigorous, whatever the order
    inside the bins: see the bounds in `curves`. Memory does not depend on how many scores.

    Raises:
        ValueError: The bins differ, a histogram is empty, or `tpr` is out of range.
    """
    if id_scores.bins != ood_scores.bins:
        raise ValueError(f"bins must be equal, came {id_scores.bins} and {ood_scores.bins}")
    for name, histogram in (("id_scores", id_scores), ("ood_scores", ood_scores)):
        check_some(int(histogram.counts.sum()), name)
    steps = steps_of_counts(id_scores.counts, ood_scores.counts, _checked_tpr(tpr))
    return {
        name: Bounded(float(row.rule.of(steps)), row.bound(steps)) for name, row in METRICS.items()
    }


def auroc(id_scores: Values, ood_scores: Values) -> float:
    """Area under the ROC curve: P(ID score > OOD score) + P(equal) / 2.

    Raises:
        ValueError: A side is empty or holds NaN or inf.
    """
    return _one("auroc", id_scores, ood_scores)


def aupr_id(id_scores: Values, ood_scores: Values) -> float:
    """Average precision with ID positive: sum of precision times the step in recall.

    Not the trapezoid, which is optimistic (55.6 against 59.9 where many scores tie). It follows
    the base rate N / (N + M).

    Raises:
        ValueError: A side is empty or holds NaN or inf.
    """
    return _one("aupr_id", id_scores, ood_scores)


def aupr_ood(id_scores: Values, ood_scores: Values) -> float:
    """Average precision with OOD positive, ranked by the negated score; see `aupr_id`.

    Raises:
        ValueError: A side is empty or holds NaN or inf.
    """
    return _one("aupr_ood", id_scores, ood_scores)


def detection_error(id_scores: Values, ood_scores: Values) -> float:
    """Smallest mean of miss rate and false alarm rate over all thresholds, (FNR + FPR) / 2.

    Liang et al. 2018, "Enhancing the Reliability of OOD Image Detection", section 4.2, at equal
    priors. The same for either positive class; at most 0.5.

    Raises:
        ValueError: A side is empty or holds NaN or inf.
    """
    return _one("detection_error", id_scores, ood_scores)


def threshold_at_tpr(id_scores: Values, tpr: float = 0.95) -> float:
    """The largest threshold that at least the share `tpr` of ID scores reach.

    With `is_ood = score < threshold` at least `tpr` of these ID scores are kept, and the share of
    OOD scores kept is `fpr_at_tpr(..., convention="first")`.

    Raises:
        ValueError: The scores are empty or hold NaN or inf, or `tpr` is not in (0, 1].
    """
    scores = one_side(id_scores, "id_scores")
    rank = scores.size - curves.num_needed(scores.size, _checked_tpr(tpr))
    return float(np.partition(scores, rank)[rank])


def fpr_at_tpr(
    id_scores: Values,
    ood_scores: Values,
    tpr: float = 0.95,
    positive: Literal["id", "ood"] = "id",
    convention: Convention = "first",
) -> float:
    """False positive rate at a true positive rate.

    Args:
        id_scores: (N,), higher means ID.
        ood_scores: (M,).
        tpr: Target, in (0, 1].
        positive: "id": share of OOD kept where `tpr` of ID is kept (Zhu 2025, Lafon 2022, Liu 2020,
            MCM, LoCoOp). "ood": share of ID rejected where `tpr` of OOD is rejected (Choi 2023's
            code, OpenOOD, pytorch-ood).
        convention: "first": the first vertex of the full ROC curve with TPR >= `tpr` (OpenOOD).
            "nearest": the vertex whose TPR is nearest `tpr`; of equally near ones that with the
            higher TPR, of equal TPR that with the lowest threshold, but for TPR 1, where it is
            the first (code of energy_ood, MCM, LoCoOp). "percentile": strictly above the
            interpolated percentile of the positive side (HEAT).

    Returns:
        The share in [0, 1]. The conventions agree within 1/N of TPR unless scores tie.

    Raises:
        ValueError: A side is empty or holds NaN or inf, or an argument is not allowed.
    """
    sides = both_sides(id_scores, ood_scores)
    if positive not in ("id", "ood"):
        raise ValueError(f'positive must be "id" or "ood", came {positive!r}')
    accepted, rejected = sides if positive == "id" else (-sides[1], -sides[0])
    if convention == "first":
        return float(np.mean(rejected >= threshold_at_tpr(accepted, tpr)))
    if convention == "percentile":
        # HEAT's form, on energies: unlike 100 * (1 - 0.95), 100 * 0.95 is exact.
        return float(np.mean(-rejected < np.percentile(-accepted, 100 * _checked_tpr(tpr))))
    if convention == "nearest":
        return _nearest_fpr(accepted, rejected, _checked_tpr(tpr))
    raise ValueError(f'convention must be "first", "nearest" or "percentile", came {convention!r}')


def aurc(scores: Values, correct: Values) -> float:
    """Area under the risk-coverage curve of a classifier that abstains on low scores.

    Geifman & El-Yaniv 2017: the mean, over samples, of the error rate among those with a score
    at least as high. Tied samples share the risk of their group.

    Args:
        scores: (N,), high where the prediction is trusted.
        correct: bool (N,), whether the prediction is right.

    Raises:
        ValueError: Empty, NaN or inf, not boolean, or lengths that differ.
    """
    values = one_side(scores, "scores")
    right = correct_rows(correct, values.size)
    return _measured({"aurc": curves.RISK}, values[right], values[~right])["aurc"]


def bootstrap_interval(
    metric: str | PairMetric,
    id_scores: Values,
    ood_scores: Values,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Stratified 95 % percentile bootstrap of a metric: ID and OOD are resampled separately.

    Args:
        metric: A name or row of `METRICS` or its function (all resamples at once, from counts),
            or any function of (id_scores, ood_scores) (one call per resample).
        id_scores: (N,).
        ood_scores: (M,).
        num_resamples: How many, at least 1.
        seed: Of numpy's generator; the same seed gives the same interval.

    Raises:
        ValueError: A side is empty or holds NaN or inf, the name is unknown, or no resamples.
    """
    (found,) = resampled([metric], (id_scores, ood_scores), num_resamples, seed)
    return Interval.of(found.value, found.resamples)


def resampled(
    names: Sequence[str | PairMetric],
    sides: tuple[Values, Values],
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[Resampled]:
    """Metrics of the same bootstrap resamples, which are drawn and counted once.

    Args:
        names: Metrics as in `bootstrap_interval`.
        sides: (id_scores, ood_scores), (N,) and (M,).
        num_resamples: How many, at least 1.
        seed: Of numpy's generator.

    Raises:
        ValueError: As in `bootstrap_interval`.
    """
    id_side, ood_side = both_sides(*sides)
    metrics = [_metric(name) for name in names]
    rows = resampled_metrics([rule for _, rule in metrics], id_side, ood_side, num_resamples, seed)
    drawn = (id_side.size, ood_side.size, seed)
    return [
        Resampled(function(id_side, ood_side), row, drawn)
        for (function, _), row in zip(metrics, rows, strict=True)
    ]


def paired_delta_interval(
    metric: str | PairMetric,
    first: tuple[Values, Values],
    second: tuple[Values, Values],
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % interval of metric(first) - metric(second), two methods on the same samples.

    Each resample draws the same samples for both methods, so what makes a sample hard for both
    cancels: much narrower than the two separate intervals. 0 outside it: the methods differ.

    Args:
        metric: As in `bootstrap_interval`.
        first: (id_scores, ood_scores) of one method, (N,) and (M,).
        second: Those of the other, row by row the same samples.
        num_resamples: How many, at least 1.
        seed: Of numpy's generator.

    Raises:
        ValueError: As in `bootstrap_interval`, or the methods differ in N or M.
    """
    of_first, of_second = (
        resampled([metric], sides, num_resamples, seed)[0] for sides in (first, second)
    )
    return of_first.minus(of_second)


def paired_accuracy_interval(
    first: Values, second: Values, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """95 % bootstrap interval of accuracy(first) - accuracy(second) on the same samples.

    Args:
        first: bool (N,), where the one method is right.
        second: bool (N,), where the other is.
        num_resamples: How many, at least 1.
        seed: Of numpy's generator.

    Raises:
        ValueError: Empty, not boolean, lengths that differ, or no resamples.
    """
    right = correct_rows(first)
    check_some(right.size, "first")
    delta = right.astype(np.int64) - correct_rows(second, right.size)
    counts = np.bincount(delta + 1, minlength=3)  # second wins, both alike, first wins
    shares = resampled_shares(counts, num_resamples, seed)
    return Interval.of(float(delta.mean()), shares[:, 2] - shares[:, 0])


def _one(name: str, id_scores: Values, ood_scores: Values) -> float:
    return _measured({name: METRICS[name].rule}, *both_sides(id_scores, ood_scores))[name]


def _measured(
    rules: Mapping[str, Rule], id_side: FloatArray, ood_side: FloatArray, tpr: float = 0.95
) -> dict[str, float]:
    totals: dict[str, FloatArray] = {}
    for steps in steps_of_sorted(*sort_both(id_side, ood_side), _checked_tpr(tpr)):
        for name, rule in rules.items():
            part = rule.of(steps)
            totals[name] = rule.combine(totals[name], part) if name in totals else part
    return {name: float(total) for name, total in totals.items()}


def _nearest_fpr(accepted: FloatArray, rejected: FloatArray, tpr: float) -> float:
    (steps,) = steps_of_sorted(np.sort(accepted), np.sort(rejected), tpr, block=2**62)
    full = np.searchsorted(-steps.id_above, -accepted.size, side="right") - 1
    distance = np.abs(steps.id_above[full:] / accepted.size - tpr)
    return float(steps.ood_above[full + distance.argmin()] / rejected.size)


def _checked_tpr(tpr: float) -> float:
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], came {tpr}")
    return tpr


def _metric(metric: str | PairMetric) -> tuple[PairMetric, Rule | PairMetric]:
    """The function to call on scores, and what resamples are judged by: a rule where known."""
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    if isinstance(metric, str):
        return METRICS[metric], METRICS[metric].rule
    known = [row.rule for row in METRICS.values() if metric in (row, row.function)]
    return metric, known[0] if known else metric


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "auroc": Metric(auroc, curves.AUROC, curves.auroc_bound, higher_is_better=True),
        "aupr_id": Metric(aupr_id, curves.AUPR_ID, curves.aupr_id_bound, higher_is_better=True),
        "aupr_ood": Metric(aupr_ood, curves.AUPR_OOD, curves.aupr_ood_bound, higher_is_better=True),
        "fpr_at_tpr": Metric(fpr_at_tpr, curves.FPR, curves.fpr_bound, higher_is_better=False),
        "fpr_at_tpr_ood": Metric(
            partial(fpr_at_tpr, positive="ood"),
            curves.FPR_OOD,
            curves.fpr_ood_bound,
            higher_is_better=False,
        ),
        "detection_error": Metric(
            detection_error, curves.ERROR, curves.error_bound, higher_is_better=False
        ),
    }
)
