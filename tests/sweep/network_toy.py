"""A toy search of networks: small random images in memory, ResNet-20 from scratch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.backbones.network_training import NetworkTraining
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.storage import Storage
from pipelines.heads.classifier import Config as Classifier
from pipelines.methods import METHODS, MethodConfig
from pipelines.records import SetName
from pipelines.sweep.networks import NetworkInputs
from pipelines.train.data import NetworkJob
from pipelines.train.image_set import network_data

CLASSES = ("red", "green", "blue")
SIZES = {
    "train": 12, "validation": 9, "test": 6, "outliers": 5, "validation_ood/a": 7,
    "validation_ood/b": 4, "ood/far/y": 6,
}  # fmt: skip
TRAINING = {
    "epochs": 2, "batch_size": 6, "outlier_batch_size": 4, "lr": 0.01, "warmup_epochs": 0,
}  # fmt: skip
SCORES = ("energy", "msp", "knn")
NEW = BackboneConfig(
    name="new", kind="cifar", model="resnet20", untrained=True,
    preprocessing=Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
)  # fmt: skip


@dataclass(frozen=True)
class InMemoryTable:
    """The decoded images of a source."""

    pixels: NDArray[np.uint8]
    address: str

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def ids(self) -> NDArray[np.uint64]:
        return np.arange(len(self.pixels), dtype=np.uint64)

    def rows_of(self, keys: list[str]) -> NDArray[np.int64]:
        return np.array([int(key) for key in keys])

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self.pixels[rows])


def table(count: int, seed: int, address: str) -> InMemoryTable:
    """Noise around a colour for each class."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 200, (count, 32, 32, 3), dtype=np.uint8)
    for row in range(count):
        pixels[row, :, :, row % 3] += 40
    return InMemoryTable(pixels, address)


def network(name: str = "energy_margin", **changes: Any) -> MethodConfig:
    settings = {"head": Classifier(train=NetworkTraining(start="random")), "training": TRAINING}
    config: MethodConfig = METHODS[name].Config(**settings | changes)
    return config


def toy_inputs(
    storage: Storage,
    *names: str,
    scores: tuple[str, ...] = SCORES,
    left_out: str = "",
    learns: bool = True,
    **changes: Any,
) -> NetworkInputs:
    """What a search of these methods (by default `tuned`, energy fine-tuning) works on."""
    tables = {
        name.replace("/", "-"): table(size, seed, name)
        for seed, (name, size) in enumerate(SIZES.items())
    }
    sets = {}
    for name, size in SIZES.items():
        known = SetName.parse(name).role in ("train", "validation", "test")
        labels = tuple(n % 3 if known else -1 for n in range(size))
        keys = tuple(map(str, range(size)))
        if SetName.parse(name).role != left_out:
            sets[name] = Selection((name.replace("/", "-"),) * size, keys, labels)
    benchmark = Benchmark("toy", CLASSES, ("{}",), "", {}, sets, "address")
    data = network_data(benchmark, tables)
    job = NetworkJob(network(m_in=-2.0, m_out=-1.0, **changes), 0, NEW)
    jobs = dict.fromkeys(names or ("tuned",), job)
    return NetworkInputs(jobs, scores, data, benchmark, tables, learns, storage)


def with_table(inputs: NetworkInputs, source: str, address: str) -> NetworkInputs:
    """The same with other pixels of a source."""
    tables = {**inputs.tables, source: replace(inputs.tables[source], address=address)}
    data = network_data(inputs.benchmark, tables)
    return replace(inputs, tables=tables, data=data)
