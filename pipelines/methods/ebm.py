"""EBM (Zhu 2025): learned prompts, cross-entropy and the DeltaEnergy bound, judged by DeltaEnergy.

Zhu 2025 states the bound (Theorems 3.4 and 3.5) but not the loss; ours is what the theorems
imply, mean(E0 - E2) as in `pipelines.ood.losses.delta_energy_bound`. E2 - E0 is often negative;
there the loss acts as consistency between the masked and the unmasked domain, and
`bound_positive_share` reports how often it does not. Models are never chosen by this loss:
keep = 1 makes it 0.

The bound acts on cosines and the cross-entropy on cosines times the logit scale, so the bound's
share of the gradient falls as the scale grows. Its weight therefore follows the scale: a weight of
1 counts logit_scale x 0.07, which is 1 at the scale that CLIP starts from (Radford 2021).
`bound_gradient_ratio` reports what is left of it: the norm of the bound's gradient in the text
features over that of the cross-entropy's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipelines.heads import AnyHead
from pipelines.heads.coop import Config as CoOpConfig
from pipelines.methods.base import (
    Batch,
    Losses,
    MethodConfig,
    MethodPlugin,
    Outputs,
    accuracy,
    cross_entropy,
)
from pipelines.ood.losses import masked_energy_change

# Of CLIP before training: its logit scale is 1 / 0.07.
INITIAL_TEMPERATURE = 0.07


class Config(MethodConfig):
    """Cross-entropy + weight x logit_scale x 0.07 x bound."""

    name: Literal["ebm"] = "ebm"
    head: AnyHead = CoOpConfig()
    score: str = Field("delta_energy", description="the selection criterion")
    weight: float = Field(
        1.0, ge=0, description="of the bound at CLIP's initial logit scale, 1 / 0.07; 0 is CoOp"
    )
    keep: float = Field(0.5, gt=0, le=1, description="share of the feature's entries kept")
    tau: float = Field(1.0, gt=0, description="temperature of the energies in the bound")
    scope: Literal["image", "top"] = Field(
        "image", description="image: mask every similarity; top: only the label's"
    )
    needs_text_features: ClassVar[bool] = True


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the logits, plus the weighted bound on the similarities."""
    if outputs.text_features is None:
        raise ValueError("the DeltaEnergy bound needs text features")
    change = _change(outputs.image_features, outputs.text_features, batch, config)
    bound = -change.mean()
    weight = config.weight * outputs.logit_scale * INITIAL_TEMPERATURE
    losses = {"cross_entropy": cross_entropy(outputs, batch)}
    report = {
        "accuracy": accuracy(outputs, batch),
        "bound": float(bound.detach()),
        "bound_positive_share": float((change.detach() > 0).float().mean()),
    }
    # Without it the graph of the bound would still be walked, for gradients of zero.
    if config.weight:
        losses["bound"] = weight * bound
        report["bound_gradient_ratio"] = weight * gradient_ratio(outputs, batch, config)
    return losses, report


def _change(images: Tensor, text: Tensor, batch: Batch, config: Config) -> Tensor:
    return masked_energy_change(
        images.float(),
        text.float(),
        batch.labels,
        tau=config.tau,
        keep=config.keep,
        scope=config.scope,
    )


def gradient_ratio(outputs: Outputs, batch: Batch, config: Config) -> float:
    """Norm of the unweighted bound's gradient in the text features, over the cross-entropy's.

    It takes the logits for scaled cosines of image and text features; 0 where the cross-entropy has
    no gradient.
    """
    assert outputs.text_features is not None
    images, logits = outputs.image_features.detach().float(), outputs.logits.detach().float()
    with torch.enable_grad():
        text = outputs.text_features.detach().float().requires_grad_()
        of_bound = torch.autograd.grad(_change(images, text, batch, config).mean(), text)[0]
    errors = logits.softmax(dim=1) - F.one_hot(batch.labels, logits.shape[1])
    norm = float((errors.T @ images).norm()) * outputs.logit_scale / len(images)
    return float(of_bound.norm()) / norm if norm else 0.0


PLUGIN = MethodPlugin(Config, loss)
