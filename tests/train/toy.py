"""A network of three classes that one can compute by hand: the mean colour and a linear layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.backbones.network_training import NetworkTraining
from pipelines.backbones.trainable import TrainableNetwork
from pipelines.data.augmentation import Augmentation
from pipelines.heads.classifier import Config as Classifier
from pipelines.methods import METHODS, MethodConfig
from pipelines.methods.base import TrainingConfig
from pipelines.train.data import NetworkData, NetworkJob

CONFIG = BackboneConfig(
    name="toy", kind="cifar", preprocessing=Preprocessing(size=4, mean=(0, 0, 0), std=(1, 1, 1))
)
NAMES = ("red", "green", "blue")


@dataclass(frozen=True)
class InMemory:
    """Images as an array."""

    pixels: NDArray[np.uint8]
    reads: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def ids(self) -> NDArray[np.uint64]:
        return np.arange(len(self.pixels), dtype=np.uint64) * 7919

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        self.reads.append(rows)
        return torch.from_numpy(self.pixels[rows])


class MeanColour(nn.Module):
    """Pixels (N, 3, H, W) to their means (N, 3)."""

    def forward(self, pixels: Tensor) -> Tensor:
        means: Tensor = pixels.mean(dim=(2, 3))
        return means


def colours(count: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def toy_data(count: int = 12, outliers: int = 10) -> NetworkData:
    return NetworkData(
        class_names=NAMES,
        images=InMemory(colours(count, 0)),
        labels=np.arange(count) % 3,
        validation=InMemory(colours(6, 1)),
        validation_labels=np.arange(6) % 3,
        outliers=InMemory(colours(outliers, 2)) if outliers else None,
        address="toy",
    )


def toy_network(trunk: nn.Module | None = None, width: int = 3) -> TrainableNetwork:
    torch.manual_seed(5)
    linear = nn.Linear(width, 3)
    with torch.no_grad():
        linear.weight.mul_(6)
    return TrainableNetwork(trunk or MeanColour(), linear, "fc", CONFIG)


def job(
    name: str, training: TrainingConfig, *, average: float = 0.0, **settings: object
) -> NetworkJob:
    config: type[MethodConfig] = METHODS[name].Config
    how = NetworkTraining(start="random", augmentation=Augmentation(), average=average)
    method = config(name=name, head=Classifier(train=how), training=training, **settings)
    return NetworkJob(method, 0, CONFIG)
