"""EBM (Zhu 2025): learned prompts, cross-entropy and the DeltaEnergy bound, judged by DeltaEnergy.

Zhu 2025 states the bound (Theorems 3.4 and 3.5) but not the loss; ours is what the theorems
imply, mean(E0 - E2) as in `pipelines.ood.losses.delta_energy_bound`. E2 - E0 is often negative;
there the loss acts as consistency between the masked and the unmasked domain, and
`bound_positive_share` reports how often it does not. Models are never chosen by this loss:
keep = 1 makes it 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

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


class Config(MethodConfig):
    """Cross-entropy + weight x bound."""

    name: Literal["ebm"] = "ebm"
    head: AnyHead = CoOpConfig()
    score: str = Field("delta_energy", description="the selection criterion")
    weight: float = Field(1.0, ge=0, description="of the bound; 0 is CoOp")
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
    change = masked_energy_change(
        outputs.image_features.float(),
        outputs.text_features.float(),
        batch.labels,
        tau=config.tau,
        keep=config.keep,
        scope=config.scope,
    )
    bound = -change.mean()
    losses = {"cross_entropy": cross_entropy(outputs, batch)}
    # Without it the graph of the bound would still be walked, for gradients of zero.
    if config.weight:
        losses["bound"] = config.weight * bound
    return losses, {
        "accuracy": accuracy(outputs, batch),
        "bound": float(bound.detach()),
        "bound_positive_share": float((change.detach() > 0).float().mean()),
    }


PLUGIN = MethodPlugin(Config, loss)
