"""A step of every image up a score, taken in each batch before it is encoded (Liang et al. 2018).

It needs a gradient with respect to the pixels, so it costs a forward and a backward pass more
than plain features, and its result depends on the score: perturbed features are a cache entry
of their own, whose address holds the score's record and eps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from pipelines.backbones.pixel_pass import StepIdentity
from pipelines.backbones.tower import Tower
from pipelines.ood import DifferentiableScore, move, record_state, step_up


@dataclass(frozen=True)
class InputStep:
    """The step x + eps * sign(grad_x S(h(x))) of an image x in [0, 1] with features h(x).

    Attributes:
        score: S, fitted (`ODIN`, `Mahalanobis`).
        eps: size of the step, in units of a pixel in [0, 1], as in the authors' code.
    """

    score: DifferentiableScore
    eps: float

    def identity(self) -> StepIdentity:
        """What of it decides a feature's value."""
        # Copies: a record may hold one tensor under two names, which the format refuses.
        state = {name: tensor.clone() for name, tensor in record_state(self.score).items()}
        content = hashlib.sha256(safetensors.torch.save(state)).hexdigest()
        return StepIdentity(score=type(self.score).__name__, record=content, eps=self.eps)

    def width(self, tower: Tower) -> int:
        """The length of what the pass gives of each image."""
        return tower.embed_dim

    def encode(self, tower: Tower, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> features (N, D) after the step."""
        return tower.encode_image(self.perturb(tower, pixels))

    def perturb(self, tower: Tower, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> normalised pixels (N, 3, H, W) after the step."""
        score = move(self.score, tower.device)

        def score_of(unit: Tensor) -> Tensor:
            features = tower.features(tower.standardize(unit))
            # A row that is not finite is rejected after encoding, and stops no other one here.
            return score.differentiable(torch.nan_to_num(features))

        return tower.standardize(step_up(tower.to_unit(pixels), score_of, self.eps))
