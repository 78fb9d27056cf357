"""ODIN's input step, taken in each batch before it is encoded (Liang et al. 2018).

It needs a gradient with respect to the pixels, so it costs a forward and a backward pass more
than plain features, and its result depends on the classes: perturbed features are a cache entry
of their own, whose address holds the text features, tau and eps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.backbones.tower import Tower
from pipelines.ood import odin_perturb
from pipelines.records import Record


class OdinIdentity(Record):
    """What of a step decides a feature's value; `text_features` is their digest."""

    text_features: str
    tau: int | float
    eps: int | float


@dataclass(frozen=True)
class Odin:
    """The step x - eps * sign(-grad_x log max_k softmax(f(x) / tau)_k).

    f(x) is logit_scale times the similarity of the image x with each class.

    Attributes:
        text_features: (K, D), unit length: the classes of a zero-shot or a trained head.
        tau: temperature.
        eps: size of the step, in units of a pixel in [0, 1], as in the authors' code.
    """

    text_features: NDArray[np.float32]
    tau: float
    eps: float

    def identity(self) -> OdinIdentity:
        """What of it decides a feature's value."""
        content = np.ascontiguousarray(self.text_features, dtype="<f4")
        text = hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()
        return OdinIdentity(text_features=text, tau=self.tau, eps=self.eps)

    def perturb(self, tower: Tower, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> normalised pixels (N, 3, H, W) after the step."""
        classes = torch.tensor(
            self.text_features, device=tower.device
        ).T  # a copy: may be read-only

        def logits(unit: Tensor) -> Tensor:
            scaled = tower.logit_scale * tower.features(tower.standardize(unit)) @ classes
            # A row that is not finite is rejected after encoding, and stops no other one here.
            return torch.nan_to_num(scaled)

        return tower.standardize(odin_perturb(tower.to_unit(pixels), logits, self.eps, self.tau))
