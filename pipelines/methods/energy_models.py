"""What `energy_correction` and `feature_ebm` share: how their energy model is trained.

Values left out (null) come from the training features by the rule of
`pipelines.ood.energy_correction.scaled`; `preset=paper` gives those of Lafon 2022.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from pipelines.config import plain
from pipelines.heads import AnyHead
from pipelines.heads.zero_shot import Config as ZeroShotConfig
from pipelines.methods.base import MethodConfig
from pipelines.ood.density import GaussianMixture
from pipelines.ood.energy_correction import EnergySettings, Projection, scaled
from pipelines.ood.statistics import ClassStatistics

_PAIR = tuple[float, float]
# Settings that are always given; the others may be left to the rule.
_GIVEN = (
    "epochs", "batch_size", "T", "l2_weight", "steps", "decay", "starts_are_negatives", "project",
    "betas", "width", "hidden", "shared_hidden", "precision",
)  # fmt: skip


def density_fields(config: MethodConfig) -> dict[str, JsonValue]:
    """A method's settings of its density, without those of its head."""
    of_head = MethodConfig.model_fields
    return {key: value for key, value in plain(config).items() if key not in of_head}


class EnergyModelConfig(MethodConfig):
    """How an energy model of features is trained and sampled (Lafon 2022, A.5.1)."""

    head: AnyHead = ZeroShotConfig()
    epochs: int = Field(20, ge=1, description="passes over the training features")
    batch_size: int = Field(256, ge=1, description="features, and chains, a step")
    lr: float | None = Field(None, gt=0, description="of Adam; null: from the number of steps")
    T: float = Field(gt=0, description="temperature of the network's energy")
    l2_weight: float = Field(ge=0, description="of the mean squared energies in the loss")
    steps: int = Field(ge=1, description="SGLD steps of a chain")
    step_size: _PAIR | None = Field(
        None, description="SGLD step from, to; null: from the features' spread"
    )
    noise: _PAIR | None = Field(
        None, description="standard deviation of SGLD's noise from, to; null: from the spread"
    )
    decay: Literal["linear", "quadratic"] = Field(
        "linear", description="of step_size and noise; quadratic: as in the authors' code"
    )
    input_noise: float | None = Field(
        None, ge=0, description="of the network's inputs in training; null: from the spread"
    )
    starts_are_negatives: bool = Field(
        False, description="chains' starts are negatives too, as in the authors' code"
    )
    project: Projection = Field(
        "none",
        description="sphere: samples back to unit length after each step; positive_sphere: "
        "without negative entries too, as in the authors' later code",
    )
    betas: _PAIR = Field((0.9, 0.999), description="of Adam; the authors' code has 0 and 0.999")
    width: int = Field(1024, ge=1, description="of the network's hidden layers")
    hidden: int = Field(5, ge=1, description="hidden layers; one more linear layer gives E")
    shared_hidden: bool = Field(False, description="hidden layers after the first are one layer")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the network's products")
    threads: int = Field(1, ge=1, description="CPU threads of a worker; part of the last bits")

    needs_trainable_head: ClassVar[bool] = False
    paper: ClassVar[EnergySettings]

    @model_validator(mode="after")
    def _ordered(self) -> EnergyModelConfig:
        for name in ("step_size", "noise"):
            pair = getattr(self, name)
            if pair is not None and min(pair) < 0:
                raise ValueError(f"{name}={list(pair)}: both must be >= 0")
        return self

    def mixture(self, statistics: ClassStatistics) -> GaussianMixture:
        """The Gaussian mixture whose scale the rule reads; a correction starts from it too."""
        return GaussianMixture.from_statistics(statistics)

    def settings(self, statistics: ClassStatistics, mixture: GaussianMixture) -> EnergySettings:
        """Every value given: the configured ones, and the rule's for those left out."""
        base = replace(self.paper, **{name: getattr(self, name) for name in _GIVEN})
        left_out = scaled(base, statistics, mixture)
        names = ("lr", "step_size", "noise", "input_noise", "T_G", "initial_std")
        given = {name: getattr(self, name, None) for name in names}
        return replace(left_out, **{name: v for name, v in given.items() if v is not None})
