"""The section `head.train`: how a method trains a whole network."""

from __future__ import annotations

from pydantic import Field

from pipelines.backbones.description import BackboneConfig
from pipelines.config import Section
from pipelines.data.augmentation import Augmentation


class NetworkTraining(Section):
    """What training a whole network needs beside a method's training settings."""

    start: str = Field(
        "backbone",
        description="backbone: fine-tune its weights; random: train from scratch; or a method of "
        "the run that trains a network: fine-tune that one, seed by seed",
    )
    backbone: BackboneConfig | None = Field(
        None,
        description="the image classifier that is trained, in place of the run's backbone: a name "
        "in conf/backbone/, or its keys",
    )
    augmentation: Augmentation = Field(
        Augmentation(), description="how training images are changed"
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the moving average of the weights that is kept; 0: the weights",
    )
