"""One epoch of every method on the toy of `tests.small_clip`, in this process.

The loop trains each method's own head with six updates; the methods whose subject is a density
(Lafon 2022's models, the Gaussian mixture) also fit it to the toy's features. A row holds the
epoch's report and a few numbers of what the head and the density say of validation images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipelines.config import load
from pipelines.finetune.loop import TrainingData, TrainingJob, train_in_process
from pipelines.methods.base import MethodConfig
from pipelines.methods.energy_models import EnergyModelConfig, density_fields
from pipelines.ood.density import GaussianMixture
from pipelines.ood.energy_training import EnergyTrainer
from pipelines.ood.statistics import ClassStatistics
from pipelines.settings.config import PipelineConfig
from tests.golden.recording import Recording
from tests.small_clip import small_clip, toy_data

NAME = "one_epoch"
TRAINING = {"epochs": 1, "batch_size": 16, "lr": 0.02, "warmup_epochs": 0}
NETWORK = {"width": 16, "hidden": 2, "epochs": 1, "batch_size": 16, "steps": 10}
SHAPE = ("weighted", "shrinkage")  # of the mixture


@dataclass(frozen=True)
class Toy:
    """What every method is trained on: a backbone with random weights, and features."""

    clip: Any
    data: TrainingData

    @classmethod
    def new(cls) -> Toy:
        """The same toy each time."""
        return cls(small_clip(), toy_data())


def methods() -> dict[str, MethodConfig]:
    """Every method as `methods=all` gives it, trained for one epoch."""
    presets = load(PipelineConfig, "pipeline", ["methods=all"]).methods
    return {name: _short(method) for name, method in presets.items()}


def _short(method: MethodConfig) -> MethodConfig:
    outliers = {"outlier_batch_size": 16} if method.needs_outliers else {}
    training = method.training.model_copy(update={**TRAINING, **outliers})
    network = NETWORK if isinstance(method, EnergyModelConfig) else {}
    return method.model_copy(update={"training": training, **network})


def record() -> Recording:
    """The numbers of every method."""
    toy = Toy.new()
    return Recording(NAME, {name: numbers(method, toy) for name, method in methods().items()})


def numbers(method: MethodConfig, toy: Toy) -> dict[str, float]:
    """One method's numbers: of its training, of its head, of its density."""
    trained = train_in_process(TrainingJob(method, 0), toy.data, toy.clip)
    report = {f"epoch/{name}": value for name, value in trained.history[-1].items()}
    features = toy.data.validation_features
    local = toy.data.validation_columns["local_features"]
    similarity = trained.predictor.similarity(features, local)
    predicted = trained.predictor.predicted(similarity)
    head = {
        "head/accuracy": (predicted == toy.data.validation_labels).mean(),
        "head/logit_scale": trained.predictor.logit_scale,
        **_summary("head/similarity", torch.as_tensor(similarity)),
    }
    found = {**report, **head, **_density(method, toy.data)}
    return {name: float(value) for name, value in found.items()}


def _density(method: MethodConfig, data: TrainingData) -> dict[str, float]:
    """The density of a method whose subject it is, fitted to the training features."""
    if method.name != "gaussian_mixture" and not isinstance(method, EnergyModelConfig):
        return {}
    fields = density_fields(method)
    shape = {name: fields[name] for name in SHAPE if name in fields}
    num_classes = len(data.class_names)
    statistics = ClassStatistics.from_batch(
        data.features, data.labels, num_classes=num_classes, normalize=True
    )
    mixture = GaussianMixture.from_statistics(statistics, **shape)
    if not isinstance(method, EnergyModelConfig):
        return _summary("density", mixture(data.validation_features))
    settings = method.settings(statistics, mixture)
    trainer = EnergyTrainer(torch.tensor(data.features), mixture, settings, seed=0)
    report = {f"density/{name}": value for name, value in trainer.epoch().items()}
    return {**report, **_summary("density", trainer.model()(data.validation_features))}


def _summary(name: str, values: torch.Tensor) -> dict[str, float]:
    """Mean, deviation and the first numbers."""
    flat = values.detach().double().flatten()
    first = {f"{name}/{n}": float(value) for n, value in enumerate(flat[:4])}
    return {f"{name}/mean": float(flat.mean()), f"{name}/std": float(flat.std()), **first}
