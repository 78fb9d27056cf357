"""Counts at and above each distinct score: the one thing that every ranking metric is made of.

The counts come from sorted scores (exact, block by block, so that 10 + 10 million scores need
little beside their sorted copies), from histograms, or from bootstrap resamples (a leading axis).
Higher scores mean in-distribution (ID); ties share one entry, so no metric depends on row order.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.ood.statistics import FloatArray

_BLOCK = 16_384  # scores of each side per block: a block and its temporaries stay in cache
_THREADED = 1_000_000  # scores from which sorting the two sides in two threads pays


@dataclass(frozen=True, eq=False)
class Steps:
    """Counts at each of V distinct scores, ascending; all arrays (..., V), float64 integers.

    `id` and `ood` count scores equal to the step's, `id_above` and `ood_above` those at or above
    it. `num_id` and `num_ood` are the totals, also where these are the steps of one block only.
    `tpr` is the target of the metrics that have one.
    """

    id: FloatArray
    ood: FloatArray
    id_above: FloatArray
    ood_above: FloatArray
    num_id: int
    num_ood: int
    tpr: float = 0.95

    @property
    def id_below(self) -> FloatArray:
        """ID scores at or below each step."""
        return self.num_id - self.id_above + self.id

    @property
    def ood_below(self) -> FloatArray:
        """OOD scores at or below each step."""
        return self.num_ood - self.ood_above + self.ood


@dataclass(frozen=True)
class Rule:
    """How a metric follows from steps: `part` of each step, joined over steps by `combine`."""

    part: Callable[[Steps], FloatArray]
    combine: np.ufunc

    def of(self, steps: Steps) -> FloatArray:
        """The metric of steps (..., V), or one block's share of it; (...)."""
        return np.asarray(self.combine.reduce(self.part(steps), axis=-1))


def steps_of_counts(id_counts: npt.ArrayLike, ood_counts: npt.ArrayLike, tpr: float) -> Steps:
    """Steps of counts (..., V) at ascending scores, such as histogram bins or resamples."""
    id_at, ood_at = np.asarray(id_counts, np.float64), np.asarray(ood_counts, np.float64)
    id_sum, ood_sum = id_at.cumsum(axis=-1), ood_at.cumsum(axis=-1)
    num_id, num_ood = int(id_sum[..., -1].max()), int(ood_sum[..., -1].max())
    id_above, ood_above = num_id - id_sum + id_at, num_ood - ood_sum + ood_at
    return Steps(id_at, ood_at, id_above, ood_above, num_id, num_ood, tpr)


def steps_of_sorted(
    id_sorted: FloatArray, ood_sorted: FloatArray, tpr: float, *, block: int = _BLOCK
) -> Iterator[Steps]:
    """Steps of ascending scores (N,) and (M,), in blocks of ascending score; no tie is cut."""
    edges = np.union1d(id_sorted[block::block], ood_sorted[block::block])
    id_cuts = [0, *np.searchsorted(id_sorted, edges), id_sorted.size]
    ood_cuts = [0, *np.searchsorted(ood_sorted, edges), ood_sorted.size]
    for i in range(edges.size + 1):
        first, second = id_cuts[i], ood_cuts[i]
        id_block, ood_block = (
            id_sorted[first : id_cuts[i + 1]],
            ood_sorted[second : ood_cuts[i + 1]],
        )
        id_at, ood_at = _counts(id_block, ood_block)
        id_above = id_sorted.size - first - id_at.cumsum() + id_at
        ood_above = ood_sorted.size - second - ood_at.cumsum() + ood_at
        yield Steps(id_at, ood_at, id_above, ood_above, id_sorted.size, ood_sorted.size, tpr)


def sort_both(first: FloatArray, second: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Sorted copies of both sides; large ones in two threads, since numpy sorts without the GIL."""
    if first.size + second.size < _THREADED:
        return np.sort(first), np.sort(second)
    with ThreadPoolExecutor(max_workers=2) as threads:
        first_sorted, second_sorted = threads.map(np.sort, (first, second))
    return first_sorted, second_sorted


def _counts(id_sorted: FloatArray, ood_sorted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """How often each distinct score of two sorted sides occurs in each side."""
    scores = np.concatenate([id_sorted, ood_sorted])
    order = scores.argsort(kind="stable")  # merges the two sorted runs in linear time
    scores = scores[order]
    is_id = (order < id_sorted.size).astype(np.float64)
    is_new = scores[1:] != scores[:-1]
    if is_new.all():  # no ties, the common case: half the work
        return is_id, 1.0 - is_id
    starts = np.flatnonzero(np.concatenate([[True], is_new]))
    id_at = np.add.reduceat(is_id, starts)
    return id_at, np.diff(starts, append=scores.size) - id_at


def num_needed(size: int, tpr: float) -> int:
    """The smallest count k with k / size >= tpr in float64, as a comparison of rates has it."""
    guess = int(tpr * size)
    return next(k for k in range(max(guess - 1, 1), guess + 3) if k / size >= tpr)


def auroc_part(steps: Steps) -> FloatArray:
    """Share of pairs that an ID score wins against the OOD scores of each step."""
    pairs = steps.ood * (steps.id_above - 0.5 * steps.id)
    return pairs / (float(steps.num_id) * steps.num_ood)


def auroc_bound(steps: Steps) -> float:
    """Pairs within a bin count half: at most that half is wrong."""
    return float((steps.id * steps.ood).sum() / (2.0 * steps.num_id * steps.num_ood))


def _precision(positive: FloatArray, negative: FloatArray) -> FloatArray:
    # Where a resample or a bin has nothing at or above, the weight of the precision is 0 too.
    return positive / np.maximum(positive + negative, 1.0)


def aupr_id_part(steps: Steps) -> FloatArray:
    """Precision of ID at each step times the step in recall."""
    return steps.id * _precision(steps.id_above, steps.ood_above) / steps.num_id


def aupr_ood_part(steps: Steps) -> FloatArray:
    """Precision of OOD, ranked from below, times the step in recall."""
    return steps.ood * _precision(steps.ood_below, steps.id_below) / steps.num_ood


def _aupr_bound(
    positive: FloatArray, above: FloatArray, negative: FloatArray, negative_above: FloatArray
) -> float:
    """Best case: all positives of a bin tie above its negatives. Worst: each stands alone below.

    The worst case's sum of (A + i) / (A + i + O), i = 1..a, is bounded below by its integral.
    """
    value = (positive * _precision(above, negative_above)).sum()
    best = (positive * _precision(above, negative_above - negative)).sum()
    start = np.maximum(above - positive + negative_above, 1.0)
    worst = (positive - negative_above * np.log1p(positive / start)).sum()
    return float(max(best - value, value - worst) / positive.sum())


def aupr_id_bound(steps: Steps) -> float:
    """Bound of `aupr_id_part`'s sum."""
    return _aupr_bound(steps.id, steps.id_above, steps.ood, steps.ood_above)


def aupr_ood_bound(steps: Steps) -> float:
    """Bound of `aupr_ood_part`'s sum."""
    return _aupr_bound(steps.ood, steps.ood_below, steps.id, steps.id_below)


def fpr_part(steps: Steps) -> FloatArray:
    """FPR of the thresholds that keep enough ID, inf elsewhere: the smallest is the first."""
    enough = steps.id_above >= num_needed(steps.num_id, steps.tpr)
    return np.where(enough, steps.ood_above, np.inf) / steps.num_ood


def fpr_bound(steps: Steps) -> float:
    """The threshold lies in the bin of the first vertex: OOD scores of that bin are uncertain."""
    enough = steps.id_above >= num_needed(steps.num_id, steps.tpr)
    return float(steps.ood[np.flatnonzero(enough)[-1]] / steps.num_ood)


def fpr_ood_part(steps: Steps) -> FloatArray:
    """The same with OOD positive: ID at or below the thresholds that reject enough OOD."""
    enough = steps.ood_below >= num_needed(steps.num_ood, steps.tpr)
    return np.where(enough, steps.id_below, np.inf) / steps.num_id


def fpr_ood_bound(steps: Steps) -> float:
    """The same for `fpr_ood_part`."""
    enough = steps.ood_below >= num_needed(steps.num_ood, steps.tpr)
    return float(steps.id[np.flatnonzero(enough)[0]] / steps.num_id)


def error_part(steps: Steps) -> FloatArray:
    """Mean of miss rate and false alarm rate at each step as threshold."""
    missed = 1.0 - steps.id_above / steps.num_id
    # 0.5 is the threshold above every score: all ID missed, no false alarm.
    return np.minimum(0.5, (missed + steps.ood_above / steps.num_ood) / 2)


def error_bound(steps: Steps) -> float:
    """A threshold inside a bin misses no fewer ID and lets no fewer OOD pass than its two edges."""
    missed = 1.0 - steps.id_above / steps.num_id
    least = np.min(missed + (steps.ood_above - steps.ood) / steps.num_ood) / 2
    return float(error_part(steps).min() - least)


def risk_part(steps: Steps) -> FloatArray:
    """Error rate at or above each step, weighted by its share; `ood` are the errors."""
    risk = _precision(steps.ood_above, steps.id_above)
    return (steps.id + steps.ood) * risk / (steps.num_id + steps.num_ood)


AUROC = Rule(auroc_part, np.add)
AUPR_ID = Rule(aupr_id_part, np.add)
AUPR_OOD = Rule(aupr_ood_part, np.add)
FPR = Rule(fpr_part, np.minimum)
FPR_OOD = Rule(fpr_ood_part, np.minimum)
ERROR = Rule(error_part, np.minimum)
RISK = Rule(risk_part, np.add)
