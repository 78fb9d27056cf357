"""CRoFT: adapters that generalise to shifted features, with an energy that is flat in them.

Zhu 2024 (CRoFT, arXiv 2405.16417), section 3.3, one objective for adapters and generator:

    cross-entropy + covariate_weight x L_c + gradient_weight x (L_e(z) + L_e(z^c))

z^c = normalise(z + G z) are generated covariate-shifted features. L_c keeps their class and drives
them away from the images of that class: cross-entropy of z^c + push x the mean over all pairs i, j
of [y_i = y_j] z^c_i . z_j. L_e is the squared length of the gradient of the mean energy
-log sum_k exp(similarity) with respect to both adapters.

The public code (LinLLLL/CRoFT) updates generator and adapters in inner steps before each outer
step (five on VLCS, none to ten elsewhere, where the outer step has the push with a minus sign) and
takes the gradient of the mean of exp(similarity) at adapters that are moved by the same small
matrix; here one step moves everything together and the gradient is that of the energy itself, since
a training step is one loss and one update for every method. Ratios, push = 5 and the range of
gradient_weight (0 to 1,000 there) are the public code's.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipelines.heads import AnyHead
from pipelines.heads.croft import Config as CRoFTConfig
from pipelines.heads.croft import adapt
from pipelines.methods.base import (
    Batch,
    Losses,
    MethodConfig,
    MethodPlugin,
    Outputs,
    accuracy,
    cross_entropy,
)


class Config(MethodConfig):
    """Cross-entropy, the generator's loss and the energy's gradient."""

    name: Literal["croft"] = "croft"
    head: AnyHead = CRoFTConfig()
    score: str = Field("mcm", description="the selection criterion")
    covariate_weight: float = Field(1.0, ge=0, description="of the generated features' loss")
    push: float = Field(5.0, ge=0, description="how hard generated features leave their class")
    gradient_weight: float = Field(
        10.0, ge=0, description="of the squared gradient of the energy in the adapters"
    )

    @model_validator(mode="after")
    def _check_adapters(self) -> Config:
        if self.head.name != "croft":
            raise ValueError(
                f"head={self.head.name}: method croft flattens the energy in the adapters of its "
                "own head; allowed: croft. For that head's cross-entropy take name=cross_entropy"
            )
        return self


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """The three parts, weighted.

    Args:
        outputs: of the head `croft`: its matrices in `extra`, the features (N, D) in `rows`.
        batch: labels (N,).
        config: the weights.
    """
    features, extra = outputs.rows["features"].float(), outputs.extra
    shifted = F.normalize(features + features @ extra["generator"].T, dim=-1)
    losses = {"cross_entropy": cross_entropy(outputs, batch)}
    if config.covariate_weight:
        losses["covariate"] = config.covariate_weight * (
            F.cross_entropy(
                _similarity(shifted, outputs, config) * outputs.logit_scale, batch.labels
            )
            + config.push * same_class_similarity(shifted, features, batch.labels)
        )
    if config.gradient_weight:
        parts = [energy_gradient(part, outputs, config) for part in (features, shifted)]
        losses["gradient"] = config.gradient_weight * torch.stack(parts).sum()
    return losses, {"accuracy": accuracy(outputs, batch)}


def same_class_similarity(shifted: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Mean over all pairs of (N, D) rows of [same class] x cosine."""
    same = labels[:, None] == labels[None, :]
    return (same * (shifted @ features.T)).mean()


def energy_gradient(features: Tensor, outputs: Outputs, config: Config) -> Tensor:
    """Squared length of the gradient of the mean energy of (N, D) in both adapters."""
    adapters = (outputs.extra["image_adapter"], outputs.extra["text_adapter"])
    energy = -torch.logsumexp(_similarity(features, outputs, config), dim=1).mean()
    gradients = torch.autograd.grad(energy, adapters, create_graph=True)
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum()


def _similarity(features: Tensor, outputs: Outputs, config: Config) -> Tensor:
    """(N, K) similarities of unadapted features (N, D), with gradients to the adapters."""
    head, extra = config.head, outputs.extra
    assert isinstance(head, CRoFTConfig)
    images = adapt(features, extra["image_adapter"], head.image_ratio)
    return images @ adapt(extra["text"], extra["text_adapter"], head.text_ratio).T


PLUGIN = MethodPlugin(Config, loss)
