"""What a training run is given and gives back, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipelines.config import UserError
from pipelines.heads import Predictor
from pipelines.methods import MethodConfig

EpochReport: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class TrainingData:
    """What heads of one benchmark and backbone are trained on.

    Attributes:
        class_names: K names.
        templates: prompts with `{}` for the class name.
        features: (N, D) unit training features; labels: (N,) their classes.
        validation_features: (V, D); validation_labels: (V,); V may be 0.
        outliers: (M, D) features of auxiliary outliers, or None.
        address: digest of what went in, so that heads are found again.
        outlier_counts: (K,) outliers that the zero-shot prompts take for each class, where a
            pass over all of them was made beforehand; measured on `outliers` where None.
        views: (N, V, D) unit features of V augmented views of each training image, or None. Epoch
            e learns from view (e - 1) mod V; what is measured once before training, and methods
            that read local features, take `features`.
        columns: further training arrays of N rows: `local_features` (N, P, D) of unit length,
            `domains` (N,); only what the run's methods ask for (`pipelines.finetune.columns`).
        validation_columns: such arrays of V rows, where a head predicts from them.
        outlier_columns: such arrays of M rows.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    validation_features: NDArray[np.float32]
    validation_labels: NDArray[np.int64]
    outliers: NDArray[np.float32] | None
    address: str
    outlier_counts: NDArray[np.int64] | None = None
    views: NDArray[np.float32] | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    validation_columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    outlier_columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingJob:
    """One training run: a method with every value given, and a seed."""

    method: MethodConfig
    seed: int


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        predictor: the head of the epoch that validation chose.
        last: the head after the last epoch.
        best_epoch: the chosen epoch, 1 .. epochs; 0 where nothing was trained.
        history: one report an epoch.
    """

    predictor: Predictor
    last: Predictor
    best_epoch: int
    history: tuple[EpochReport, ...]


class Checkpoint(Protocol):
    """Where a run keeps its state after each epoch."""

    def load(self) -> bytes | None:
        """What was saved last, or None."""

    def save(self, content: bytes) -> None:
        """Replace it, whole or not at all."""


def check(job: TrainingJob, data: TrainingData) -> None:
    """Refuse data that cannot train this job, before any training.

    Raises:
        UserError: naming what is missing.
    """
    method = job.method
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    if len(counts) > len(data.class_names) or data.labels.min(initial=0) < 0:
        raise UserError(
            f"labels from {data.labels.min()} to {data.labels.max()}; the class list has "
            f"{len(data.class_names)} names"
        )
    empty = [name for name, n in zip(data.class_names, counts, strict=True) if n == 0]
    # A head that is built from the class names' text knows a class without an image.
    learns_from_images = method.head.trainable and "text" not in method.head.needs
    if empty and (learns_from_images or method.adjust_logits):
        raise UserError(f"no training image of: {', '.join(empty)}; remove the class or add images")
    if method.needs_outliers and (data.outliers is None or not len(data.outliers)):
        raise UserError(
            f"method={method.name} learns from outliers and the benchmark has none; give it a "
            "set named outliers, or choose a method that needs none"
        )
    missing = [name for name in columns_of(method) if name not in data.columns]
    if missing:
        raise UserError(
            f"method={method.name} with head={method.head.name} reads {', '.join(missing)} of the "
            "training images, which were not loaded; embed.local_features=true keeps local "
            "features, a source's column domain gives domains"
        )


def columns_of(method: MethodConfig) -> tuple[str, ...]:
    """The arrays with a row for each image that a method's loss or its head reads."""
    return tuple(dict.fromkeys((*method.columns, *method.head.columns)))
