"""The score of nearest neighbours: a frozen record of training features, HIGH for in-distribution.

Memory beside the two sides' features is a block of similarities, never (N, M).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipelines.ood.checks import Array
from pipelines.ood.statistics import Values, feature_rows, l2_normalized

_BLOCK = 2**22  # numbers in the largest temporary of one block of rows
_QUERIES, _NEIGHBOURS = 512, 16_384  # rows of each side in one block of similarities


@dataclass(frozen=True, eq=False)
class KNN:
    """Minus the Euclidean distance to the k-th nearest training feature, both at unit length.

    Sun et al. 2022, "OOD Detection with Deep Nearest Neighbors", eq. 1; Lafon 2022 A.4. Neighbours
    are searched by block-wise inner products in the dtype of the training features (at least
    float32); the distances to the k found are then taken in float64, so duplicates are at 0.
    """

    features: Tensor
    k: int

    @classmethod
    def fit(
        cls,
        features: Array,
        labels: Values | None = None,  # noqa: ARG003 - one signature for all records
        *,
        k: int = 50,
    ) -> Self:
        """Keep features (N, D) at unit length; labels are not used.

        Raises:
            ValueError: `features` is not (N, D), holds NaN or inf or a row of zeros, or k is not
                in 1..N.
        """
        rows = feature_rows(features)
        if not 1 <= k <= len(rows):
            raise ValueError(f"k must lie in 1..{len(rows)}, the training features; came {k}")
        return cls(_unit_rows(rows, torch.promote_types(rows.dtype, torch.float32)), k)

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,), in [-2, 0]."""
        rows = feature_rows(features, self.features.shape[1]).to(self.features.device)
        unit = _unit_rows(rows, self.features.dtype)
        return -torch.cat([self._distances(part) for part in torch.split(unit, _QUERIES)])

    def _distances(self, queries: Tensor) -> Tensor:
        """To the k-th nearest neighbour of unit rows (Q, D)."""
        nearest = self._nearest(queries)
        step = max(1, _BLOCK // (self.k * queries.shape[1]))
        parts = zip(torch.split(queries.double(), step), torch.split(nearest, step), strict=True)
        return torch.cat(
            [
                (self.features[index].double() - part[:, None]).norm(dim=2).amax(dim=1)
                for part, index in parts
            ]
        )

    def _nearest(self, queries: Tensor) -> Tensor:
        """Row numbers (Q, k) of the largest inner products."""
        best = queries.new_empty(len(queries), 0)
        index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for start in range(0, len(self.features), _NEIGHBOURS):
            block = queries @ self.features[start : start + _NEIGHBOURS].T
            value, place = block.topk(min(self.k, block.shape[1]), dim=1, sorted=False)
            value, place = torch.cat([best, value], 1), torch.cat([index, place + start], 1)
            best, kept = value.topk(min(self.k, value.shape[1]), dim=1, sorted=False)
            index = place.gather(1, kept)
        return index


def _unit_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    step = max(1, _BLOCK // rows.shape[1])
    return torch.cat([l2_normalized(part.double()).to(dtype) for part in torch.split(rows, step)])
