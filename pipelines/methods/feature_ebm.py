"""The stand-alone energy-based model of features: Lafon 2022's ablation without the mixture.

Its chains start from a normal distribution and it has no reference to fall back on; Lafon 2022
shows that it misses modes. As a score, `feature_ebm` judges every other head too.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.methods.base import Batch, Losses, MethodPlugin, Outputs, cross_entropy
from pipelines.methods.energy_models import EnergyModelConfig
from pipelines.ood.energy_correction import EBM, EnergySettings


class Config(EnergyModelConfig):
    """Network and sampler."""

    name: Literal["feature_ebm"] = "feature_ebm"
    score: str = Field("feature_ebm", description="the selection criterion")
    T: float = Field(1e-2, gt=0, description="temperature of the network's energy")
    l2_weight: float = Field(0.1, ge=0, description="of the mean squared energies in the loss")
    steps: int = Field(200, ge=1, description="SGLD steps of a chain")
    initial_std: float | None = Field(
        None, ge=0, description="chains start from N(0, this^2); null: at the features' length"
    )
    paper: ClassVar[EnergySettings] = EBM


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:  # noqa: ARG001
    """Cross-entropy, where the head has anything to train."""
    return {"cross_entropy": cross_entropy(outputs, batch)}, {}


PLUGIN = MethodPlugin(Config, loss)
