"""Mergeable statistics: what a shard of features or scores is reduced to.

Each record is built from one batch (`from_batch`), joined with `merge` in any order, and read
through properties. Counts are exact; float64 moments are joined by the pairwise update of Chan,
Golub & LeVeque (1983), so shards give the one-shot result to rounding. All records are frozen
and hold numpy arrays only: they pickle, and Ray or any other engine can reduce over them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.ood.checks import Array, as_tensor, check_finite

Values: TypeAlias = Tensor | npt.ArrayLike
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

_ROWS = 65_536  # rows that from_batch widens to float64 at a time
_SCORES = 262_144  # scores that a histogram bins at a time: the temporaries stay in cache


class Mergeable(Protocol):
    """A statistic of part of the data that joins with that of another part."""

    def merge(self, other: Self) -> Self:
        """The statistic of both parts together."""
        ...


M = TypeVar("M", bound=Mergeable)


def merge_all(statistics: Iterable[M]) -> M:
    """Join the statistics of all shards.

    Raises:
        ValueError: there is nothing to join.
    """
    shards = list(statistics)
    if not shards:
        raise ValueError("no statistics to merge: the list of shards is empty")
    return reduce(lambda first, second: first.merge(second), shards)


def score_array(scores: Values, name: str = "scores") -> FloatArray:
    """Scores (N,) as a float64 numpy array; half precision is widened, a GPU tensor is copied.

    Raises:
        ValueError: `scores` is not (N,), or holds NaN or infinity (count and first row are told).
    """
    if isinstance(scores, Tensor):
        scores = scores.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), came {array.shape}")
    if not np.isfinite(array).all():
        check_finite(as_tensor(array, name, rank=1), name)
    return array


def feature_rows(
    features: Array, num_columns: int | None = None, *, name: str = "features"
) -> Tensor:
    """Features (N, D) as a detached tensor of their own dtype and device.

    Raises:
        ValueError: `features` is not (N, `num_columns`), or holds NaN or infinity.
    """
    rows = as_tensor(features, name, rank=2).detach()
    if num_columns not in (None, rows.shape[1]):
        raise ValueError(f"{name} must have shape (N, {num_columns}), came {tuple(rows.shape)}")
    check_finite(rows, name)
    return rows


def class_labels(labels: Values, num_classes: int | None = None) -> Tensor:
    """Labels (N,) as an int64 CPU tensor.

    Raises:
        ValueError: not one-dimensional integers, negative, or not below `num_classes`.
    """
    # A copy: labels are small, and arrays that Parquet or Ray hand out are read-only.
    rows = labels.detach().cpu() if isinstance(labels, Tensor) else torch.tensor(np.array(labels))
    whole = rows.numel() == 0 or not (rows.is_floating_point() or rows.is_complex())
    if rows.ndim != 1 or not whole:
        raise ValueError(f"labels must be integers (N,), came {rows.dtype} {tuple(rows.shape)}")
    rows = rows.long()
    if rows.numel() and (rows.min() < 0 or rows.max() >= (num_classes or rows.max() + 1)):
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1 if num_classes else 'C-1'}, "
            f"came {int(rows.min())}..{int(rows.max())}"
        )
    return rows


def l2_normalized(features: Tensor) -> Tensor:
    """Rows of features (N, D) at unit Euclidean length.

    Raises:
        ValueError: a row is all zeros, so that it has no direction.
    """
    length = features.norm(dim=1, keepdim=True)
    if (length == 0).any():
        raise ValueError(f"{int((length == 0).sum())} rows are all zeros: they have no direction")
    return torch.div(features, length)


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """How many samples each class has; `counts` int64 (C,)."""

    counts: IntArray

    @classmethod
    def from_batch(cls, labels: Values, num_classes: int) -> Self:
        """Counts of labels (N,).

        Raises:
            ValueError: a label is not in 0..num_classes-1.
        """
        rows = class_labels(labels, num_classes)
        return cls(torch.bincount(rows, minlength=num_classes).numpy())

    def merge(self, other: Self) -> Self:
        """Counts of both parts."""
        _same("number of classes", self.counts.size, other.counts.size)
        return type(self)(self.counts + other.counts)

    @property
    def prior(self) -> FloatArray:
        """Share of each class (C,), sum 1 (Lafon 2022 eq. 10; Choi 2023 step 1)."""
        total = self.counts.sum()
        if total == 0:
            raise ValueError("no samples were counted: there is no class prior")
        return np.asarray(self.counts / total)


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Class means and scatter of features: all that Gaussian scores need (Lafon 2022 eq. 10).

    `counts` int64 (C,); `means` (C, D), zero where a class is empty; `scatter` (D, D), the sum
    over classes and samples of (z - mu_c)(z - mu_c)^T; `normalized`: features were L2-normalised.
    """

    counts: IntArray
    means: FloatArray
    scatter: FloatArray
    normalized: bool = False

    @classmethod
    def from_batch(
        cls, features: Array, labels: Values, *, num_classes: int, normalize: bool = False
    ) -> Self:
        """Statistics of features (N, D) with labels (N,), in float64, a block of rows at a time.

        Raises:
            ValueError: NaN or inf, a label outside 0..num_classes-1, or lengths that differ.
        """
        rows, classes = feature_rows(features), class_labels(labels, num_classes)
        _same("number of features and labels", len(rows), len(classes))
        starts = range(0, max(len(rows), 1), _ROWS)
        return merge_all(
            cls._of_block(rows[i : i + _ROWS], classes[i : i + _ROWS], num_classes, normalize)
            for i in starts
        )

    @classmethod
    def _of_block(cls, rows: Tensor, labels: Tensor, num_classes: int, normalize: bool) -> Self:
        rows = rows.to("cpu", torch.float64)
        rows = l2_normalized(rows) if normalize else rows
        counts = torch.bincount(labels, minlength=num_classes)
        means = rows.new_zeros(num_classes, rows.shape[1]).index_add_(0, labels, rows)
        means /= counts.clamp(min=1)[:, None]
        centred = rows - means[labels]
        return cls(counts.numpy(), means.numpy(), (centred.T @ centred).numpy(), normalize)

    def merge(self, other: Self) -> Self:
        """Statistics of both parts.

        Raises:
            ValueError: the parts differ in classes, dimension or normalisation.
        """
        _same("shape of the class means", self.means.shape, other.means.shape)
        _same("normalisation", self.normalized, other.normalized)
        counts = self.counts + other.counts
        share = other.counts / np.maximum(counts, 1)
        delta = other.means - self.means
        between = (delta * (self.counts * share)[:, None]).T @ delta
        return type(self)(
            counts,
            self.means + delta * share[:, None],
            self.scatter + other.scatter + between,
            self.normalized,
        )

    @property
    def num_samples(self) -> int:
        """Number of rows seen."""
        return int(self.counts.sum())

    @property
    def prior(self) -> FloatArray:
        """Share of each class (C,), sum 1."""
        return ClassCounts(self.counts).prior

    @property
    def mean(self) -> FloatArray:
        """Mean of all features (D,)."""
        return self.prior @ self.means

    @property
    def covariance(self) -> FloatArray:
        """Tied covariance (D, D): scatter around the class means over N (Lee 2018)."""
        return self.scatter / max(self.num_samples, 1)

    @property
    def total_covariance(self) -> FloatArray:
        """Class-free covariance (D, D), over N: the tied one plus that of the class means."""
        offset = self.means - self.mean
        return self.covariance + (offset * self.prior[:, None]).T @ offset


@dataclass(frozen=True, eq=False)
class EnergyMoments:
    """Mean and spread of energies (or of any score); `squares` is the sum of (x - mean)^2."""

    count: int
    mean: float
    squares: float
    minimum: float
    maximum: float

    @classmethod
    def from_batch(cls, energy: Values) -> Self:
        """Moments of energies (N,).

        Raises:
            ValueError: NaN or inf.
        """
        array = score_array(energy, "energies")
        if not array.size:
            return cls(0, 0.0, 0.0, np.inf, -np.inf)
        mean = float(array.mean())
        squares = float(((array - mean) ** 2).sum())
        return cls(array.size, mean, squares, float(array.min()), float(array.max()))

    def merge(self, other: Self) -> Self:
        """Moments of both parts."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        delta = other.mean - self.mean
        return type(self)(
            count,
            self.mean + delta * share,
            self.squares + other.squares + delta * delta * self.count * share,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    @property
    def std(self) -> float:
        """Standard deviation over N."""
        if self.count == 0:
            raise ValueError("no energies were seen: there is no standard deviation")
        return float(np.sqrt(self.squares / self.count))


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """Counts of scores in equal bins of [low, high), plus one open bin below and one above.

    `counts` int64 (num_bins + 2,). Constant memory for any number of scores; the metrics of two
    such histograms come with a bound on their error (`metrics.histogram_metrics`).
    """

    low: float
    high: float
    counts: IntArray

    @classmethod
    def from_batch(cls, scores: Values, *, low: float, high: float, num_bins: int = 65_536) -> Self:
        """Histogram of scores (N,).

        Raises:
            ValueError: NaN or inf, `low` not below `high`, or no bins.
        """
        if not low < high or num_bins < 1:
            raise ValueError(f"need low < high and num_bins >= 1, came {low}, {high}, {num_bins}")
        array = score_array(scores)
        counts = np.zeros(num_bins + 2, dtype=np.int64)
        for start in range(0, array.size, _SCORES):
            # Each step is monotone in floating point, so bins are ordered intervals exactly.
            place = (array[start : start + _SCORES] - low) * (num_bins / (high - low)) + 1
            index = np.clip(place, 0, num_bins + 1).astype(np.int64)
            counts += np.bincount(index, minlength=num_bins + 2)
        return cls(float(low), float(high), counts)

    def merge(self, other: Self) -> Self:
        """Histogram of both parts.

        Raises:
            ValueError: the bins differ.
        """
        _same("bins", self.bins, other.bins)
        return type(self)(self.low, self.high, self.counts + other.counts)

    @property
    def bins(self) -> tuple[float, float, int]:
        """(low, high, num_bins): histograms merge and compare only where these are equal."""
        return self.low, self.high, self.counts.size - 2


def _same(what: str, first: object, second: object) -> None:
    if first != second:
        raise ValueError(f"the {what} must be equal, came {first} and {second}")
