"""Scores that are fitted to training features: frozen records, HIGH for in-distribution (ID).

`X.fit(features, labels, ...)` -> X, `x(features)` -> float64 (N,). Features (N, D) are walked in
blocks of rows: memory beside the input is a block, never (N, N). Records that need class means
and covariances are also built by `from_statistics` from `statistics.ClassStatistics`, which
shards merge into. Everything is computed in float64 on the CPU or device of the record.

What `shrinkage` does about singular covariances stands in `gaussians`.
`pipelines.ood.fitted_scores` lists them for callers and tests.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipelines.ood.checks import Array, check_positive
from pipelines.ood.gaussians import Gaussians, rounding_limit
from pipelines.ood.linear_layer import LinearLayer
from pipelines.ood.rows import walk
from pipelines.ood.statistics import (
    ClassStatistics,
    Values,
    class_labels,
    feature_rows,
    l2_normalized,
)


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """Minus the squared Mahalanobis distance to the nearest class mean, tied covariance.

    Lee et al. 2018, "A Simple Unified Framework for Detecting OOD Samples", eq. 2; Lafon 2022
    eq. 13, which prints min for the max over classes.
    """

    gaussians: Gaussians

    @classmethod
    def fit(cls, features: Array, labels: Values, *, shrinkage: float | None = None) -> Self:
        """Fit to features (N, D) with int labels (N,).

        Raises:
            ValueError: Shapes do not fit, NaN or inf, no samples, or no variance within classes.
        """
        return cls.from_statistics(_statistics(features, labels), shrinkage=shrinkage)

    @classmethod
    def from_statistics(
        cls, statistics: ClassStatistics, *, shrinkage: float | None = None
    ) -> Self:
        """Fit to the merged statistics of shards."""
        return cls(Gaussians.of(_checked(statistics, normalized=False), shrinkage))

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,), at most 0."""
        return _nearest_class(self.gaussians, features, _as_given)

    def differentiable(self, rows: Tensor) -> Tensor:
        """The score (B,), differentiable (Lee et al. 2018, eq. 4)."""
        return -self.gaussians.squared_distances(rows.to(self.gaussians.means)).amin(dim=1)


@dataclass(frozen=True, eq=False)
class SSD:
    """`Mahalanobis` on L2-normalised features (Sehwag et al. 2021; Lafon 2022 A.4)."""

    gaussians: Gaussians

    @classmethod
    def fit(cls, features: Array, labels: Values, *, shrinkage: float | None = None) -> Self:
        """Fit to features (N, D) of any length with int labels (N,); raises as `Mahalanobis`."""
        statistics = _statistics(features, labels, normalize=True)
        return cls.from_statistics(statistics, shrinkage=shrinkage)

    @classmethod
    def from_statistics(
        cls, statistics: ClassStatistics, *, shrinkage: float | None = None
    ) -> Self:
        """Fit to merged statistics that were taken with `normalize=True`."""
        return cls(Gaussians.of(_checked(statistics, normalized=True), shrinkage))

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,), at most 0."""
        return _nearest_class(self.gaussians, features, l2_normalized)


@dataclass(frozen=True, eq=False)
class RelativeMahalanobis:
    """Mahalanobis score minus the class-free one (Ren et al. 2021, eq. 3)."""

    classes: Gaussians
    background: Gaussians

    @classmethod
    def fit(cls, features: Array, labels: Values, *, shrinkage: float | None = None) -> Self:
        """Fit to features (N, D) with int labels (N,); raises as `Mahalanobis`."""
        return cls.from_statistics(_statistics(features, labels), shrinkage=shrinkage)

    @classmethod
    def from_statistics(
        cls, statistics: ClassStatistics, *, shrinkage: float | None = None
    ) -> Self:
        """Fit to the merged statistics of shards."""
        checked = _checked(statistics, normalized=False)
        return cls(
            Gaussians.of(checked, shrinkage), Gaussians.of(checked, shrinkage, class_free=True)
        )

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        near = _nearest_class(self.classes, features, _as_given)
        return near - _nearest_class(self.background, features, _as_given)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """-E_G / T_G with E_G = -log sum_c [pi_c] exp(-(z - mu_c)^T Sigma^-1 (z - mu_c)).

    Lafon 2022 eq. 1, 9 and 10: the energy of the class-conditional mixture, written there without
    pi_c (`weighted=True` puts it in) and without the 1/2 of a Gaussian. `normalize=True` takes
    features at unit length, as all of Lafon 2022's results do.
    """

    gaussians: Gaussians
    T_G: float
    weighted: bool
    normalize: bool

    @classmethod
    def fit(
        cls,
        features: Array,
        labels: Values,
        *,
        T_G: float = 1e3,
        weighted: bool = False,
        normalize: bool = False,
        shrinkage: float | None = None,
    ) -> Self:
        """Fit to features (N, D) with int labels (N,); raises as `Mahalanobis`."""
        statistics = _statistics(features, labels, normalize=normalize)
        return cls.from_statistics(statistics, T_G=T_G, weighted=weighted, shrinkage=shrinkage)

    @classmethod
    def from_statistics(
        cls,
        statistics: ClassStatistics,
        *,
        T_G: float = 1e3,
        weighted: bool = False,
        shrinkage: float | None = None,
    ) -> Self:
        """Fit to the merged statistics of shards, which say whether features are normalised."""
        check_positive(T_G, "T_G")
        normalized = statistics.normalized
        gaussians = Gaussians.of(_checked(statistics, normalized=normalized), shrinkage)
        return cls(gaussians, float(T_G), weighted, normalized)

    def energy(self, features: Tensor) -> Tensor:
        """E_G (N,) of features as they are, not yet over T_G; differentiable."""
        exponent = -self.gaussians.squared_distances(features)
        if self.weighted:
            exponent = exponent + self.gaussians.log_prior
        return -exponent.logsumexp(dim=1)

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        prepare = l2_normalized if self.normalize else _as_given
        return walk(
            features,
            self.gaussians.means,
            lambda rows: -self.energy(prepare(rows)) / self.T_G,
        )


@dataclass(frozen=True, eq=False)
class ViM:
    """logsumexp(f) - alpha ||P_perp (z - o)||, logits f = W z + b, o = -pinv(W) b.

    Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit Matching", eq. 4 to 8. P_perp
    projects off the first `num_components` principal directions of the training features about o;
    alpha matches the mean residual to the mean largest logit. For CLIP, W = logit_scale x text
    features and b = 0.
    """

    weight: Tensor
    bias: Tensor
    origin: Tensor
    residual: Tensor
    alpha: float

    @classmethod
    def fit(
        cls,
        features: Array,
        labels: Values | None,  # noqa: ARG003 - one signature for all records
        weight: Array,
        bias: Array | None = None,
        *,
        num_components: int | None = None,
    ) -> Self:
        """Fit to features (N, D) and a linear head; labels are not used.

        Args:
            features: (N, D).
            labels: Ignored.
            weight: W (K, D).
            bias: b (K,), zeros by default.
            num_components: Dimension of the principal space, below the rank of the features. By
                default 1000 for D >= 2048, 512 for D >= 768, else D // 2, as in the paper's code,
                and at most half of the rank (few samples leave no residual otherwise).

        Raises:
            ValueError: Shapes do not fit, NaN or inf, or no residual beside `num_components`.
        """
        layer = LinearLayer.of(weight, bias)
        head, offset = layer.weight, layer.bias
        rows = feature_rows(features, head.shape[1])
        origin = -torch.linalg.pinv(head) @ offset
        statistics = _statistics(rows, torch.zeros(len(rows), dtype=torch.long))
        shift = torch.from_numpy(statistics.mean) - origin
        moment = torch.from_numpy(statistics.covariance) + torch.outer(shift, shift)
        unscaled = cls(head, offset, origin, _residual_space(moment, num_components), alpha=1.0)
        largest = walk(rows, head, lambda part: unscaled._logits(part).amax(dim=1)).mean()
        alpha = largest / walk(rows, head, unscaled._residual_norm).mean()
        return dataclasses.replace(unscaled, alpha=float(alpha))

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        return walk(
            features,
            self.weight,
            lambda rows: self._logits(rows).logsumexp(1) - self.alpha * self._residual_norm(rows),
        )

    def _logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = rows @ self.weight.T + self.bias
        return logits

    def _residual_norm(self, rows: Tensor) -> Tensor:
        lengths: Tensor = ((rows - self.origin) @ self.residual).norm(dim=1)
        return lengths


@dataclass(frozen=True, eq=False)
class KLMatching:
    """Minus min_c KL(p || p_c), p_c the mean softmax of training rows predicted as class c.

    Hendrycks et al. 2022, "Scaling OOD Detection for Real-World Settings", section 4. Reads
    logits, not features. Classes that are never predicted are skipped. `log_means` (C, K).
    """

    log_means: Tensor

    @classmethod
    def fit(cls, logits: Array) -> Self:
        """Fit to training logits (N, K).

        Raises:
            ValueError: `logits` is not (N, K), is empty, or holds NaN or inf.
        """
        rows = feature_rows(logits, name="logits")
        if len(rows) == 0:
            raise ValueError("logits is empty: there is nothing to fit to")
        predicted = rows.argmax(dim=1)
        means = []
        for label in torch.unique(predicted):
            members = rows[predicted == label].double().log_softmax(dim=1)
            # In the log domain: a mean probability may underflow, its logarithm does not.
            means.append(members.logsumexp(dim=0) - math.log(len(members)))
        return cls(torch.stack(means))

    def __call__(self, logits: Array) -> Tensor:
        """Scores (N,), at most 0 up to rounding."""
        return walk(logits, self.log_means, self._score)

    def _score(self, rows: Tensor) -> Tensor:
        log_p = rows.log_softmax(dim=1)
        p = log_p.exp()
        cross = p @ self.log_means.T
        return cross.amax(dim=1) - (p * log_p).sum(dim=1)


def _statistics(features: Array, labels: Values, *, normalize: bool = False) -> ClassStatistics:
    classes = class_labels(labels)
    if len(classes) == 0:
        raise ValueError("labels is empty: there is nothing to fit to")
    return ClassStatistics.from_batch(
        features, classes, num_classes=int(classes.max()) + 1, normalize=normalize
    )


def _checked(statistics: ClassStatistics, *, normalized: bool) -> ClassStatistics:
    if statistics.normalized != normalized:
        raise ValueError(
            f"this score needs statistics taken with normalize={normalized}, "
            f"came normalize={statistics.normalized}"
        )
    return statistics


def _residual_space(moment: Tensor, num_components: int | None) -> Tensor:
    """Directions (D, D - num_components) beside the principal ones of a second moment (D, D)."""
    values, vectors = torch.linalg.eigh(moment)
    size, rank = len(values), int((values > rounding_limit(values)).sum())
    if num_components is None:
        of_code = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
        num_components = min(of_code, rank // 2)
    if not 0 <= num_components < rank:
        raise ValueError(
            f"num_components must lie in 0..{rank - 1}, below the rank of the training features; "
            f"came {num_components}"
        )
    residual: Tensor = vectors[:, : size - num_components].contiguous()
    return residual


def _nearest_class(
    gaussians: Gaussians, features: Array, prepare: Callable[[Tensor], Tensor]
) -> Tensor:
    return walk(
        features,
        gaussians.means,
        lambda rows: -gaussians.squared_distances(prepare(rows)).amin(dim=1),
    )


def _as_given(rows: Tensor) -> Tensor:
    return rows
