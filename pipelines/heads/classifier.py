"""A network's own linear layer on the benchmark's classes, as it was trained.

logits = W h + b of the penultimate activations h (Hendrycks 2017, Liu 2020 and most baselines judge
such logits). The benchmark's classes may be some of the network's, in any order.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.backbones.classifier import rows_of
from pipelines.backbones.network_training import NetworkTraining
from pipelines.config import UserError
from pipelines.heads import base, rules
from pipelines.heads.base import (
    HeadConfig,
    HeadContext,
    HeadOutput,
    HeadPlugin,
    Predictor,
)


class Config(HeadConfig):
    """The backbone's own linear layer: as it is, or trained with the whole network."""

    name: Literal["classifier"] = "classifier"
    train: NetworkTraining | None = Field(
        None, description="train the whole network from its pixels; none: it stays as it is"
    )
    trainable: ClassVar[bool] = False
    has_text_features: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        """An image classifier."""
        return ("classifier",)

    @property
    def network(self) -> NetworkTraining | None:
        """How the whole network is trained."""
        return self.train


class Classifier(nn.Module):
    """W h + b with fixed W (K, D) and b (K,)."""

    def __init__(self, weight: Tensor, bias: Tensor, class_names: tuple[str, ...]) -> None:
        """Keep the layer's rows of the classes."""
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.logit_scale = 1.0
        self.class_names = class_names

    def text_features(self) -> Tensor:
        """Refused: the rows of W are no text features.

        Raises:
            UserError: always.
        """
        raise UserError("head=classifier has no text features")

    def encode(self, image_features: Tensor) -> HeadOutput:
        """The logits of activations (N, D)."""
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return HeadOutput(F.linear(image_features, weight, bias), image_features)

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The layer."""
        arrays = {name: base.to_numpy(self.get_buffer(name)) for name in ("weight", "bias")}
        return Predictor("classifier", arrays, {}, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> Classifier:  # noqa: ARG001
    """The rows of the benchmark's classes; `seed` changes nothing.

    Raises:
        UserError: where the backbone is no classifier, or does not know a class.
    """
    device = context.features.device
    weight, bias = rows_of(context.classifier, context.class_names)
    return Classifier(
        torch.tensor(weight, device=device), torch.tensor(bias, device=device), context.class_names
    )


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.weight_similarity,
    linear=rules.weight_rule,
    has_cosines=False,
    takes_unit=False,
    has_activations=True,
)
