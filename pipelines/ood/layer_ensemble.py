"""Scores of several layers of a network as one (Lee et al. 2018, "feature ensemble")."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipelines.ood.checks import Array
from pipelines.ood.density import Mahalanobis
from pipelines.ood.statistics import Values, feature_rows


@dataclass(frozen=True, eq=False)
class LayerEnsemble:
    """sum_l alpha_l M_l(x), M_l the `Mahalanobis` score of layer l's mean activations.

    Lee et al. 2018, section 2.2 and algorithm 1. There a logistic regression on OOD or adversarial
    images sets alpha_l; no such image is seen here: alpha_l = 1 / (L std_l), with std_l the
    standard deviation of M_l over the training images, so that no layer outweighs another by its
    width. Without the input step of algorithm 1, which `perturbed_mahalanobis` takes on features.
    """

    layers: tuple[Mahalanobis, ...]
    weights: Tensor

    @classmethod
    def fit(
        cls,
        layers: Array,
        labels: Values,
        layer_sizes: Sequence[int],
        *,
        shrinkage: float | None = None,
    ) -> Self:
        """Fit to the layers' activations side by side.

        Args:
            layers: (N, W), mean activations over all places of an image, layer after layer.
            labels: (N,) ints.
            layer_sizes: L, the channels of each layer; their sum is W.
            shrinkage: of each layer's covariance, see `pipelines.ood.gaussians`.

        Raises:
            ValueError: Sizes do not add up, a layer's score is constant, or as `Mahalanobis`.
        """
        widths = list(map(int, layer_sizes))
        rows = feature_rows(layers)
        if not widths or min(widths) < 1 or sum(widths) != rows.shape[1]:
            raise ValueError(f"layers of sizes {widths} are not the {rows.shape[1]} columns given")
        parts = torch.split(rows, widths, dim=1)
        fitted = tuple(Mahalanobis.fit(part, labels, shrinkage=shrinkage) for part in parts)
        scores = torch.stack([one(part) for one, part in zip(fitted, parts, strict=True)])
        deviations = scores.std(dim=1, correction=0)
        if not (deviations > 0).all():
            raise ValueError("a layer gives every training image the same score")
        return cls(fitted, 1 / (len(widths) * deviations))

    def __call__(self, layers: Array) -> Tensor:
        """Scores (N,), at most 0, of activations (N, W)."""
        widths = [len(one.gaussians.center) for one in self.layers]
        parts = torch.split(feature_rows(layers, sum(widths)), widths, dim=1)
        scores = [
            weight * one(part)
            for weight, one, part in zip(self.weights, self.layers, parts, strict=True)
        ]
        return torch.stack(scores).sum(dim=0)
