"""No training: an image classifier as it was trained, judged like any other head."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.heads import AnyHead
from pipelines.heads.classifier import Config as ClassifierConfig
from pipelines.methods.base import Batch, Losses, MethodConfig, MethodPlugin, Outputs, cross_entropy


class Config(MethodConfig):
    """The backbone's own linear layer."""

    name: Literal["classifier"] = "classifier"
    head: AnyHead = ClassifierConfig()
    score: str = Field("energy", description="the selection criterion")
    needs_trainable_head: ClassVar[bool] = False

    @model_validator(mode="after")
    def _train_nothing(self) -> Config:
        if self.head.name != "classifier":
            raise ValueError(
                f"head={self.head.name}: method classifier judges the backbone's own linear layer, "
                "which is its own head; allowed: classifier. For that head's cross-entropy take "
                "name=cross_entropy"
            )
        return self


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:  # noqa: ARG001
    """Cross-entropy, should the head have anything to train."""
    return {"cross_entropy": cross_entropy(outputs, batch)}, {}


PLUGIN = MethodPlugin(Config, loss)
