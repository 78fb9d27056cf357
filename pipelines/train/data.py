"""What the training of a network is given and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.backbones.description import BackboneConfig, Start
from pipelines.config import UserError
from pipelines.methods import MethodConfig

EpochReport: TypeAlias = dict[str, float]
OnEpoch: TypeAlias = Callable[[EpochReport], None]


class Images(Protocol):
    """Images of one size by row, wherever they lie (`pipelines.train.images`)."""

    @property
    def ids(self) -> NDArray[np.uint64]:
        """(N,) what the random numbers of an image's augmentation start from."""

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """8-bit RGB (n, H, W, 3) of these rows."""


@dataclass(frozen=True)
class NetworkData:
    """What networks of one benchmark are trained on.

    Attributes:
        class_names: K names.
        images: the training images; labels: (N,) their classes.
        validation, validation_labels: those that each epoch is judged on; may be empty.
        outliers: auxiliary outliers, or None.
        address: digest of what went in, so that networks are found again.
    """

    class_names: tuple[str, ...]
    images: Images
    labels: NDArray[np.int64]
    validation: Images
    validation_labels: NDArray[np.int64]
    outliers: Images | None
    address: str


@dataclass(frozen=True)
class NetworkJob:
    """One training.

    Attributes:
        method: with every value given.
        seed: of what is drawn.
        backbone: resolved; the architecture, and the weights that training starts from.
        trained: the address of the trained network whose weights it starts from instead.
        outlier_counts: (K,) how many outliers the backbone takes for each class, where the method
            asks for it.
    """

    method: MethodConfig
    seed: int
    backbone: BackboneConfig
    trained: str | None = None
    outlier_counts: tuple[int, ...] | None = None

    @property
    def start(self) -> Start:
        """Whether the weights are the backbone's, or drawn."""
        how = self.method.network
        return "random" if how is not None and how.start == "random" else "backbone"


@dataclass(frozen=True)
class TrainedNetwork:
    """What training gave.

    Attributes:
        state: every parameter and statistic by the architecture's own names, on the CPU.
        history: one report an epoch.
    """

    state: dict[str, Tensor]
    history: tuple[EpochReport, ...]


def check(job: NetworkJob, data: NetworkData) -> None:
    """Refuse data that cannot train this job, before any training.

    Raises:
        UserError: naming what is missing.
    """
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    empty = [name for name, n in zip(data.class_names, counts, strict=True) if n == 0]
    if empty:
        raise UserError(f"no training image of: {', '.join(empty)}; remove the class or add images")
    if job.method.needs_outliers and (data.outliers is None or not len(data.outliers.ids)):
        raise UserError(
            f"method={job.method.name} learns from outliers and the benchmark has none; give it a "
            "set named outliers, or choose a method that needs none"
        )
