"""Gaussians that share one covariance, in whitened coordinates, from mergeable statistics.

Singular covariances (more dimensions than samples, constant columns): `shrinkage` blends the
covariance with its mean variance, (1 - s) Sigma + s tr(Sigma)/D I. By default s = 0 where Sigma
has full rank and the oracle-approximating value of Chen et al. 2010 where it has not; s = 0 asks
for the pseudo-inverse, which sees no distance along directions without training variance.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipelines.ood.statistics import ClassStatistics


@dataclass(frozen=True, eq=False)
class Gaussians:
    """Class-conditional Gaussians with one covariance, in whitened coordinates.

    `center` (D,) is subtracted before `whitener` (D, R) is applied, R the rank of the covariance:
    distances are then Euclidean, and no large offset cancels. `whitened_means` (C, R) are the
    `means` (C, D) of the C classes that have samples there, `log_prior` (C,) the logarithms of
    their shares; `spread` (R, D) undoes the whitening: spread^T spread is the covariance.
    """

    center: Tensor
    whitener: Tensor
    whitened_means: Tensor
    means: Tensor
    log_prior: Tensor
    spread: Tensor

    @classmethod
    def of(
        cls, statistics: ClassStatistics, shrinkage: float | None, *, class_free: bool = False
    ) -> Self:
        """One Gaussian per class with the tied covariance, or one of all features.

        Raises:
            ValueError: No samples, no variance within classes, or `shrinkage` not in [0, 1].
        """
        if statistics.num_samples == 0:
            raise ValueError("features is empty: there is nothing to fit to")
        covariance = statistics.total_covariance if class_free else statistics.covariance
        mean = statistics.mean
        if covariance.trace() <= 1e-24 * (mean @ mean):
            raise ValueError("features do not vary within classes: they have no covariance")
        samples, center = statistics.num_samples, torch.from_numpy(mean)
        whitener, spread = _factors(torch.from_numpy(covariance), samples, shrinkage)
        means, prior = center[None], center.new_ones(1)
        if not class_free:
            seen = statistics.counts > 0
            means = torch.from_numpy(statistics.means[seen])
            prior = torch.from_numpy(statistics.prior[seen])
        return cls(center, whitener, (means - center) @ whitener, means, prior.log(), spread)

    def squared_distances(self, features: Tensor) -> Tensor:
        """(z - mu_c)^T Sigma^-1 (z - mu_c), (N, C); differentiable, never negative."""
        rows = (features - self.center) @ self.whitener
        means = self.whitened_means
        lengths = rows.square().sum(dim=1, keepdim=True) + means.square().sum(dim=1)
        return (lengths - 2 * rows @ means.T).clamp(min=0)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws (num_samples, D) from sum_c pi_c N(mu_c, Sigma) (Lafon 2022 eq. 9)."""
        classes = torch.multinomial(
            self.log_prior.exp(), num_samples, replacement=True, generator=generator
        )
        noise = torch.empty(num_samples, len(self.spread)).to(self.spread)
        return self.means[classes] + noise.normal_(generator=generator) @ self.spread


def _factors(
    covariance: Tensor, num_samples: int, shrinkage: float | None
) -> tuple[Tensor, Tensor]:
    """Whitener W (D, R) with W W^T = Sigma^-1 (or pseudo-inverse), and spread (R, D)."""
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], came {shrinkage}")
    values, vectors = torch.linalg.eigh(covariance)
    limit = rounding_limit(values)
    if shrinkage is None:
        shrinkage = _oas(values, num_samples) if values[0] <= limit else 0.0
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
    kept = values > limit
    scale, vectors = values[kept].sqrt(), vectors[:, kept]
    # Contiguous, so that a record read back from a file gives the same last bit.
    return (vectors / scale).contiguous(), (vectors * scale).T.contiguous()


def rounding_limit(eigenvalues: Tensor) -> float:
    """Ascending eigenvalues of a covariance at or below this are rounding of float32 features.

    The root of an eigenvalue is a singular value of the features (over sqrt N), so this is numpy's
    rule for the rank of a float32 matrix, squared. Channels that never fire leave such values: as
    variances they would make a distance of what is noise.
    """
    relative = len(eigenvalues) * torch.finfo(torch.float32).eps
    return float(eigenvalues[-1]) * relative**2


def _oas(eigenvalues: Tensor, num_samples: int) -> float:
    """Oracle-approximating shrinkage (Chen et al. 2010, eq. 23 without its 2/D terms)."""
    mean_square = float(eigenvalues.square().mean()) / len(eigenvalues)
    square_mean = float(eigenvalues.mean()) ** 2
    gap = (num_samples + 1) * (mean_square - square_mean / len(eigenvalues))
    return min(1.0, (mean_square + square_mean) / gap) if gap > 0 else 1.0
