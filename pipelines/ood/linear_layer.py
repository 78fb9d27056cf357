"""Scores of penultimate activations and the linear layer after them, HIGH for in-distribution.

Logits are f = W h + b of a network's penultimate activations h >= 0 (after the last ReLU and the
pooling). The first group shapes h and takes the energy score of the shaped logits,
logsumexp(W g(h) + b): it costs no pass over the images. The records are those of
`pipelines.ood.density`: `X.fit(...)` -> X, `x(features)` -> float64 (N,).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipelines.ood.checks import Array, as_tensor, check_finite
from pipelines.ood.rows import walk
from pipelines.ood.statistics import feature_rows, l2_normalized


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """W (K, D) and b (K,) of logits W h + b, float64."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Array, bias: Array | None) -> Self:
        """The layer of these arrays; b is zero by default.

        Raises:
            ValueError: Shapes do not fit, NaN or inf.
        """
        matrix = feature_rows(weight, name="weight").cpu().double()
        if bias is None:
            return cls(matrix, matrix.new_zeros(len(matrix)))
        offset = as_tensor(bias, "bias", rank=1).detach().cpu().double()
        check_finite(offset, "bias")
        if len(offset) != len(matrix):
            raise ValueError(f"bias must have shape ({len(matrix)},), came {tuple(offset.shape)}")
        return cls(matrix, offset)

    def logits(self, rows: Tensor) -> Tensor:
        """(B, K) of activations (B, D)."""
        logits: Tensor = rows @ self.weight.T + self.bias
        return logits

    def energy(self, rows: Tensor) -> Tensor:
        """The energy score (B,), logsumexp of the logits."""
        return self.logits(rows).logsumexp(dim=1)

    def walk(self, features: Array, score: Callable[[Tensor], Tensor]) -> Tensor:
        """`score` (N,) of features (N, D) in blocks."""
        return walk(features, self.weight, score)


@dataclass(frozen=True, eq=False)
class ReAct:
    """Energy of activations that are cut at c, min(h, c).

    Sun et al. 2021, "ReAct: Out-of-distribution Detection With Rectified Activations", eq. 4; c is
    a quantile of all training activations.
    """

    layer: LinearLayer
    threshold: float

    @classmethod
    def fit(
        cls,
        activations: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        percentile: float = 0.9,
    ) -> Self:
        """Fit c to activations (N, D) under the layer W (K, D), b (K,).

        Args:
            activations: h (N, D) of the training images.
            weight: W (K, D).
            bias: b (K,), zeros by default.
            percentile: The share of activations below c, in 0..1.

        Raises:
            ValueError: Shapes do not fit, NaN or inf, no activations, or `percentile` beyond 0..1.
        """
        layer = LinearLayer.of(weight, bias)
        return cls(layer, _quantile(_training_rows(activations, layer), percentile, "percentile"))

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        return self.layer.walk(
            features, lambda rows: self.layer.energy(rows.clamp(max=self.threshold))
        )


@dataclass(frozen=True, eq=False)
class VRA:
    """Energy of activations of which the small are dropped and the large cut at `high`.

    Xu et al. 2023, "VRA: Variational Rectified Activation for Out-of-distribution Detection",
    eq. 9: g(h) = 0 below `low`, h between, `high` above. Both are quantiles of all training
    activations, as ReAct's c. (pytorch-ood raises small activations to a quantile of their own
    dimension instead.)
    """

    layer: LinearLayer
    low: float
    high: float

    @classmethod
    def fit(
        cls,
        activations: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        lower: float = 0.6,
        upper: float = 0.95,
    ) -> Self:
        """Fit both limits to activations (N, D) under the layer W (K, D), b (K,).

        Args:
            activations: h (N, D) of the training images.
            weight: W (K, D).
            bias: b (K,), zeros by default.
            lower: The share of activations that are dropped, in 0..upper.
            upper: The share of activations below `high`, in 0..1.

        Raises:
            ValueError: As `ReAct.fit`, or `lower` > `upper`.
        """
        if lower > upper:
            raise ValueError(f"lower must not be above upper, came {lower} and {upper}")
        layer = LinearLayer.of(weight, bias)
        rows = _training_rows(activations, layer)
        return cls(layer, _quantile(rows, lower, "lower"), _quantile(rows, upper, "upper"))

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        return self.layer.walk(features, lambda rows: self.layer.energy(self._shaped(rows)))

    def _shaped(self, rows: Tensor) -> Tensor:
        return torch.where(rows < self.low, 0.0, rows.clamp(max=self.high))


@dataclass(frozen=True, eq=False)
class DICE:
    """Energy under the weights that contribute most on average.

    Sun and Li 2022, "DICE: Leveraging Sparsification for Out-of-Distribution Detection", eq. 2 and
    3: W_kd stays where W_kd x mean(h_d) is among the largest of all, else it is 0. `layer` is the
    masked one.
    """

    layer: LinearLayer

    @classmethod
    def fit(
        cls, activations: Array, weight: Array, bias: Array | None = None, *, sparsity: float = 0.9
    ) -> Self:
        """Fit the mask to activations (N, D) under the layer W (K, D), b (K,).

        Args:
            activations: h (N, D) of the training images.
            weight: W (K, D).
            bias: b (K,), zeros by default.
            sparsity: The share of weights that are set to 0, in 0..1.

        Raises:
            ValueError: As `ReAct.fit`.
        """
        layer = LinearLayer.of(weight, bias)
        contribution = layer.weight * _training_rows(activations, layer).double().mean(dim=0)
        limit = _quantile(contribution, sparsity, "sparsity")
        return cls(LinearLayer(torch.where(contribution > limit, layer.weight, 0.0), layer.bias))

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        return self.layer.walk(features, self.layer.energy)


@dataclass(frozen=True, eq=False)
class _Pruned(ABC):
    """A layer, and how many of a row's activations are kept: its largest ones."""

    layer: LinearLayer
    kept: int

    @classmethod
    def fit(cls, weight: Array, bias: Array | None = None, *, percentile: float = 0.65) -> Self:
        """Take the layer W (K, D), b (K,); there is nothing to learn.

        Args:
            weight: W (K, D).
            bias: b (K,), zeros by default.
            percentile: The share of a row's activations that counts as small, in 0..1.

        Raises:
            ValueError: Shapes do not fit, NaN or inf, or `percentile` leaves no activation.
        """
        layer = LinearLayer.of(weight, bias)
        _check_share(percentile, "percentile")
        size = layer.weight.shape[1]
        kept = size - round(size * percentile)
        if kept < 1:
            raise ValueError(f"percentile={percentile} keeps none of {size} activations")
        return cls(layer, kept)

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        return self.layer.walk(features, lambda rows: self.layer.energy(self._shaped(rows)))

    @abstractmethod
    def _shaped(self, rows: Tensor) -> Tensor:
        """The activations (B, D) whose energy is the score."""

    def _pruned(self, rows: Tensor) -> Tensor:
        """The rows with only their `kept` largest activations."""
        largest, place = rows.topk(self.kept, dim=1)
        return torch.zeros_like(rows).scatter(1, place, largest)

    def _scale(self, rows: Tensor) -> Tensor:
        """exp(s1 / s2) (B, 1): the sum of a row over that of its largest activations."""
        share: Tensor = rows.sum(dim=1) / rows.topk(self.kept, dim=1).values.sum(dim=1)
        # A row of zeros has no largest activation, and stays as it is.
        return torch.nan_to_num(share, nan=0.0).exp()[:, None]


class AshP(_Pruned):
    """Energy of a row's largest activations alone.

    Djurisic et al. 2023, "Extremely Simple Activation Shaping for Out-of-Distribution Detection",
    algorithm 1.
    """

    def _shaped(self, rows: Tensor) -> Tensor:
        return self._pruned(rows)


class AshB(_Pruned):
    """Energy of a row's largest activations, all set to one value that keeps the row's sum.

    Djurisic et al. 2023, algorithm 2.
    """

    def _shaped(self, rows: Tensor) -> Tensor:
        place = rows.topk(self.kept, dim=1).indices
        value = rows.sum(dim=1, keepdim=True) / self.kept
        return torch.zeros_like(rows).scatter(1, place, value.expand_as(place))


class AshS(_Pruned):
    """Energy of a row's largest activations times exp(s1 / s2), its sum before over after.

    Djurisic et al. 2023, algorithm 3.
    """

    def _shaped(self, rows: Tensor) -> Tensor:
        return self._pruned(rows) * self._scale(rows)


class Scale(_Pruned):
    """Energy of all activations of a row times exp(s1 / s2), as in ASH-S but without pruning.

    Xu et al. 2024, "Scaling for Training Time and Post-hoc Out-of-distribution Detection
    Enhancement", eq. 6 and 7.
    """

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows * self._scale(rows)


@dataclass(frozen=True, eq=False)
class NNGuide:
    """Energy times the mean similarity with the k best training features, weighted by theirs.

    Park et al. 2023, "Nearest Neighbor Guidance for Out-of-Distribution Detection", eq. 5 and 6:
    E(h) x mean over the k largest of E(h_i) cos(h, h_i). `bank` (N, D) holds E(h_i) h_i / |h_i| of
    all training features (the paper takes a random part of them).
    """

    layer: LinearLayer
    bank: Tensor
    k: int

    @classmethod
    def fit(
        cls, activations: Array, weight: Array, bias: Array | None = None, *, k: int = 10
    ) -> Self:
        """Keep the bank of activations (N, D) under the layer W (K, D), b (K,).

        Args:
            activations: h (N, D) of the training images.
            weight: W (K, D).
            bias: b (K,), zeros by default.
            k: Neighbours, in 1..N.

        Raises:
            ValueError: As `ReAct.fit`, or k is not in 1..N.
        """
        layer = LinearLayer.of(weight, bias)
        rows = _training_rows(activations, layer)
        if not 1 <= k <= len(rows):
            raise ValueError(f"k must lie in 1..{len(rows)}, the training features; came {k}")
        energy = layer.walk(rows, layer.energy)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return cls(layer, (l2_normalized(rows.double()) * energy[:, None]).to(dtype), k)

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,)."""
        return walk(features, self.bank, self._score)

    def _score(self, rows: Tensor) -> Tensor:
        similarity = l2_normalized(rows) @ self.bank.T
        guidance = similarity.topk(self.k, dim=1).values.double().mean(dim=1)
        return self.layer.energy(rows.double()) * guidance


@dataclass(frozen=True, eq=False)
class FDBD:
    """Mean distance to the decision boundaries over the distance to the training features' mean.

    Liu and Qin 2024, "Fast Decision Boundary based Out-of-Distribution Detector", eq. 5 and 6:
    mean over c != m of |f_m - f_c| / |w_m - w_c|, divided by |h - mean(h)|; m is the predicted
    class. `between` (K, K) holds |w_m - w_c|.
    """

    layer: LinearLayer
    mean: Tensor
    between: Tensor

    @classmethod
    def fit(cls, activations: Array, weight: Array, bias: Array | None = None) -> Self:
        """Take the mean of activations (N, D) under the layer W (K, D), b (K,).

        Raises:
            ValueError: As `ReAct.fit`, or there are fewer than 2 classes.
        """
        layer = LinearLayer.of(weight, bias)
        if len(layer.weight) < 2:
            raise ValueError("weight has one class: there is no boundary")
        between = torch.cdist(layer.weight, layer.weight)
        between.fill_diagonal_(1.0)  # a class's gap to itself is 0
        between = torch.where(between > 0, between, math.inf)  # no boundary between equal rows
        return cls(layer, _training_rows(activations, layer).double().mean(dim=0), between)

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,), at least 0."""
        return self.layer.walk(features, self._score)

    def _score(self, rows: Tensor) -> Tensor:
        logits = self.layer.logits(rows)
        largest, predicted = logits.max(dim=1)
        distances = (largest[:, None] - logits) / self.between[predicted]
        centre = (rows - self.mean).norm(dim=1).clamp(min=1e-8)
        score: Tensor = distances.sum(dim=1) / (len(self.between) - 1) / centre
        return score


def _training_rows(activations: Array, layer: LinearLayer) -> Tensor:
    rows = feature_rows(activations, layer.weight.shape[1], name="activations").cpu()
    if len(rows) == 0:
        raise ValueError("activations is empty: there is nothing to fit to")
    return rows


def _check_share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0..1, came {value}")


def _quantile(values: Tensor, share: float, name: str) -> float:
    """The `share` quantile of all numbers; numpy's, since torch's stops at 2^24 of them."""
    _check_share(share, name)
    return float(np.quantile(values.numpy(), share))
