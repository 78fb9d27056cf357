"""The energy-correction model: a network corrects a Gaussian mixture of features (Lafon 2022).

Lafon et al. 2022. The head is the backbone's own prompts unless another is chosen; what is trained
for this method is the density that judges (`pipelines.ood.energy_correction`). As a score,
`energy_correction` judges every other head too, with these settings.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.methods.base import Batch, Losses, MethodPlugin, Outputs, cross_entropy
from pipelines.methods.energy_models import EnergyModelConfig
from pipelines.ood.density import GaussianMixture
from pipelines.ood.energy_correction import CORRECTION, EnergySettings
from pipelines.ood.statistics import ClassStatistics


class Config(EnergyModelConfig):
    """Mixture, correction and sampler."""

    name: Literal["energy_correction"] = "energy_correction"
    score: str = Field("energy_correction", description="the selection criterion")
    T: float = Field(1.0, gt=0, description="temperature of the network's energy")
    T_G: float | None = Field(
        None, gt=0, description="temperature of the mixture; null: from the features' distances"
    )
    l2_weight: float = Field(10.0, ge=0, description="of the mean squared energies in the loss")
    steps: int = Field(20, ge=1, description="SGLD steps of a chain")
    weighted: bool = Field(False, description="mixture with the classes' shares")
    shrinkage: float | None = Field(
        None, ge=0, le=1, description="of the covariance; null: only where it is singular"
    )
    paper: ClassVar[EnergySettings] = CORRECTION

    def mixture(self, statistics: ClassStatistics) -> GaussianMixture:
        """The Gaussian mixture that the network corrects."""
        return GaussianMixture.from_statistics(
            statistics, weighted=self.weighted, shrinkage=self.shrinkage
        )


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:  # noqa: ARG001
    """Cross-entropy, where the head has anything to train."""
    return {"cross_entropy": cross_entropy(outputs, batch)}, {}


PLUGIN = MethodPlugin(Config, loss)
