"""A small nonlinear text tower: one parameter vector, shared by all classes, gives their features.

It stands in for a learned context in a text encoder, small enough that Hessians are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class TextMap:
    """h_k(theta) = normalise(prototype_k + W_out sin(W_in theta + offset_k)), unit rows.

    The sine keeps local minima at finite theta, which a saturating map would not.

    Attributes:
        prototypes: (K, D) features of the class names alone; zeros for none.
        offsets: (K, H) what distinguishes the classes inside the map.
        weight_in: (H, P).
        weight_out: (D, H).
    """

    prototypes: Tensor
    offsets: Tensor
    weight_in: Tensor
    weight_out: Tensor

    @classmethod
    def random(
        cls, prototypes: Tensor, generator: torch.Generator, *, width: int, num_parameters: int
    ) -> TextMap:
        """A map with Gaussian weights, in the dtype of `prototypes`."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=prototypes.dtype)

        return cls(
            prototypes,
            offsets=normal(prototypes.shape[0], width),
            weight_in=normal(width, num_parameters) / num_parameters**0.5,
            weight_out=normal(prototypes.shape[1], width) / width**0.5,
        )

    def __call__(self, theta: Tensor) -> Tensor:
        """Text features (K, D) of the parameters theta (P,)."""
        hidden = torch.sin(self.weight_in @ theta + self.offsets)
        return normalize(self.prototypes + hidden @ self.weight_out.T, dim=1)
