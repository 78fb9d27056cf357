"""CRoFT: adapters that generalise to shifted features, with an energy that is flat in them.

Zhu 2024 (CRoFT, arXiv 2405.16417), section 3.3, one objective for adapters and generator:

    cross-entropy + covariate_weight x L_c + gradient_weight x (L_e(z) + L_e(z^c))

z^c = normalise(z + G z) are generated covariate-shifted features. L_c keeps their class and drives
them away from the images of that class: cross-entropy of z^c + push x the mean over all pairs i, j
of [y_i = y_j] z^c_i . z_j. L_e is the squared length of the gradient of the mean energy
-log sum_k exp(similarity) with respect to both adapters.

That is the default: one update of adapters and generator together, with the push added. The
public scripts (LinLLLL/CRoFT) have `generator_steps` updates by L_c before each such update, in
which adapters and generator move alike, and then another sign of the push (`push_sign`):

    PACS, ResNet-50   generator_steps=0  push_sign=0
    PACS, ViT         generator_steps=1  push_sign=-1
    VLCS              generator_steps=5  push_sign=0
    46 of ImageNet    generator_steps=1  push_sign=-1, with one shot generator_steps=10

At push_sign=0 the update has no push, and the energy's gradient at the images alone. What differs
still: there, features are generated from adapted ones, as these were before the inner updates; in
the update proper they are adapted once more at 1 - image_ratio, or not at all; and the gradient is
that of the mean of exp(similarity) in one small matrix added to both adapters, where it is here
that of the energy in each. Ratios are the public code's; it tries push from 0 to 20 (on PACS
15, here 5) and gradient weights from 0 to 1,000.
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

    generator_steps: int = Field(
        0, ge=0, description="updates by the generated features' loss alone before each update"
    )
    push_sign: Literal[-1, 0, 1] = Field(
        1, description="of the push in the update itself; 0 and -1 are the public scripts'"
    )

    @property
    def inner_steps(self) -> int:
        """Updates by `inner_loss`."""
        return self.generator_steps

    @model_validator(mode="after")
    def _check_generator(self) -> Config:
        if self.generator_steps and not self.covariate_weight:
            raise ValueError(
                f"generator_steps={self.generator_steps}: with covariate_weight=0 these updates "
                "have no loss; give it more, or generator_steps=0"
            )
        return self

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
    features, shifted = _features(outputs)
    losses = {"cross_entropy": cross_entropy(outputs, batch)}
    if config.covariate_weight:
        given = features, shifted
        losses["covariate"] = _covariate(outputs, batch, config, given, config.push_sign)
    if config.gradient_weight:
        read = (features, shifted) if config.push_sign else (features,)
        parts = [energy_gradient(part, outputs, config) for part in read]
        losses["gradient"] = config.gradient_weight * torch.stack(parts).sum()
    return losses, {"accuracy": accuracy(outputs, batch)}


def inner_loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """The generated features' loss L_c, which the updates before each update have alone."""
    return {"covariate": _covariate(outputs, batch, config, _features(outputs), 1)}, {}


def _features(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The images' features z (N, D), and those generated from them, normalise(z + G z)."""
    features = outputs.rows["features"].float()
    return features, F.normalize(features + features @ outputs.extra["generator"].T, dim=-1)


def _covariate(
    outputs: Outputs, batch: Batch, config: Config, given: tuple[Tensor, Tensor], sign: int
) -> Tensor:
    """Weighted: cross-entropy of generated features + sign x push x their same-class similarity."""
    features, shifted = given
    logits = _similarity(shifted, outputs, config) * outputs.logit_scale
    kept = F.cross_entropy(logits, batch.labels)
    alike = same_class_similarity(shifted, features, batch.labels)
    return config.covariate_weight * (kept + sign * config.push * alike)


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


PLUGIN = MethodPlugin(Config, loss, inner_loss=inner_loss)
