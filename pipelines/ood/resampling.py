"""Bootstrap resamples of a metric, all at once from counts where a rule for it is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.ood.curves import Rule, Steps, steps_of_counts
from pipelines.ood.statistics import FloatArray, IntArray

PairMetric: TypeAlias = Callable[[Any, Any], float]  # of (id_scores, ood_scores)

_SCORES_AT_ONCE = 2_000_000  # resampled scores held at a time


@dataclass(frozen=True)
class Interval:
    """A metric and its 95 % bootstrap interval, the 2.5 and 97.5 percentiles of resamples."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: FloatArray) -> Self:
        """The interval of a value from its resamples (R,)."""
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(float(value), float(low), float(high))

    @classmethod
    def mean(cls, parts: Sequence["Interval"]) -> Self:
        """Means of the values and of the ends of several intervals, at least one.

        Wide rather than narrow: what the parts have independent of each other does not cancel.
        """
        columns = [(part.value, part.low, part.high) for part in parts]
        return cls(*(float(np.mean(column)) for column in zip(*columns, strict=True)))

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Resampled:
    """A metric of scores, and of bootstrap resamples of them.

    Attributes:
        value: Of the scores.
        resamples: (R,), of each resample.
        drawn: N, M and the seed, from which the drawn rows follow.
    """

    value: float
    resamples: FloatArray
    drawn: tuple[int, int, int]

    def minus(self, other: Self) -> Interval:
        """The paired 95 % interval of self - other, two methods on the same samples.

        Raises:
            ValueError: They were not resampled alike.
        """
        if self.drawn != other.drawn or self.resamples.shape != other.resamples.shape:
            raise ValueError(
                "both methods must score the same samples, resampled alike; came (N, M, seed) "
                f"{self.drawn} and {other.drawn}"
            )
        return Interval.of(self.value - other.value, self.resamples - other.resamples)


def resampled_metrics(
    metrics: Sequence[Rule | PairMetric],
    id_scores: FloatArray,
    ood_scores: FloatArray,
    num_resamples: int,
    seed: int,
) -> FloatArray:
    """Metrics (metrics, num_resamples) of stratified resamples.

    Which rows are drawn follows from N, M and the seed: two methods' scores of the same samples
    are resampled alike.

    Args:
        metrics: Rules on counts, or functions that are called for each resample.
        id_scores: (N,).
        ood_scores: (M,).
        num_resamples: At least 1.
        seed: Of numpy's generator.
    """
    generator = np.random.default_rng(seed)
    num_id, num_ood = id_scores.size, ood_scores.size
    at_once = max(1, _SCORES_AT_ONCE // (num_id + num_ood))
    chunks = []
    for start in range(0, _checked(num_resamples), at_once):
        rows = min(at_once, num_resamples - start)
        id_rows = generator.integers(num_id, size=(rows, num_id))
        ood_rows = generator.integers(num_ood, size=(rows, num_ood))
        chunks.append(_of_rows(metrics, id_scores, ood_scores, id_rows, ood_rows))
    return np.concatenate(chunks, axis=1)


def resampled_shares(counts: IntArray, num_resamples: int, seed: int) -> FloatArray:
    """Shares (num_resamples, C) of resamples of sum(counts) samples of C kinds, counts (C,)."""
    size = int(counts.sum())
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(size, counts / size, size=_checked(num_resamples))
    return np.asarray(draws / size)


def _of_rows(
    metrics: Sequence[Rule | PairMetric],
    id_scores: FloatArray,
    ood_scores: FloatArray,
    id_rows: IntArray,
    ood_rows: IntArray,
) -> FloatArray:
    """The metrics (metrics, resamples) of these rows."""
    rules = [metric for metric in metrics if isinstance(metric, Rule)]
    steps = _steps(id_scores, ood_scores, id_rows, ood_rows) if rules else None
    found = []
    for metric in metrics:
        if isinstance(metric, Rule):
            assert steps is not None
            found.append(metric.of(steps))
        else:
            pairs = zip(id_rows, ood_rows, strict=True)
            found.append(np.array([metric(id_scores[i], ood_scores[j]) for i, j in pairs]))
    return np.stack(found)


def _steps(
    id_scores: FloatArray, ood_scores: FloatArray, id_rows: IntArray, ood_rows: IntArray
) -> Steps:
    """The counts of each resample at each distinct score."""
    values, place = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    id_counts = _row_counts(place[: id_scores.size][id_rows], values.size)
    ood_counts = _row_counts(place[id_scores.size :][ood_rows], values.size)
    return steps_of_counts(id_counts, ood_counts, tpr=0.95)


def _row_counts(places: npt.NDArray[np.intp], size: int) -> npt.NDArray[np.intp]:
    """How often each of 0..size-1 stands in each row of places (R, N); (R, size)."""
    offsets = np.arange(len(places))[:, None] * size
    flat = np.bincount((places + offsets).ravel(), minlength=len(places) * size)
    return flat.reshape(len(places), size)


def _checked(num_resamples: int) -> int:
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, came {num_resamples}")
    return num_resamples
