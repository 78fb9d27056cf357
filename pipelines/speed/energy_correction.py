"""Training of the energy-correction model beside the matrix products that it cannot do without.

One run trains the model of Lafon 2022 (8,000 features of 512 dimensions, the paper's network, 20
SGLD steps) for some steps; the reference repeats exactly its products in a bare loop: those of
every SGLD step (the network forward, and back to its input; the mixture's two, forward and back)
and those of the update (forward, weights and inputs back). Activations, noise, the sampler's
arithmetic, the loss and Adam are what the ratio counts. Both in float32, on the same threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.ood import GaussianMixture, auroc
from pipelines.ood.energy_correction import CORRECTION, EnergySettings, scaled
from pipelines.ood.energy_training import EnergyTrainer, train
from pipelines.ood.statistics import ClassStatistics
from pipelines.speed.measure import Row, compare, with_note

ROWS, COLUMNS, CLASSES, BATCH = 8_000, 512, 10, 64
STEPS = 250  # optimiser steps: two epochs of 125


def features(count: int, *, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Unit features (count, 512) around ten directions; `shift` moves them off their classes."""
    generator = torch.Generator().manual_seed(seed)
    means = F.normalize(torch.randn(CLASSES, COLUMNS, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, COLUMNS, generator=generator) * 0.02
    # Heavy tails, so that there is something for the network to correct.
    noise *= 0.5 + torch.rand(count, 1, generator=generator)
    moved = means[labels] + noise + shift * torch.randn(count, COLUMNS, generator=generator)
    return F.normalize(moved), labels


def run(*, scale: float = 1.0) -> list[Row]:
    """The ratio for training, and what bfloat16 products change.

    Args:
        scale: share of the optimiser steps, in (0, 1].
    """
    rows, labels = features(ROWS, seed=1)
    statistics = ClassStatistics.from_batch(rows, labels, num_classes=CLASSES, normalize=True)
    mixture = GaussianMixture.from_statistics(statistics)
    settings = replace(CORRECTION, batch_size=BATCH, epochs=2)
    settings = scaled(settings, statistics, mixture)
    steps = max(2, round(STEPS * scale))
    used = rows[: steps * BATCH // settings.epochs]
    trainer = EnergyTrainer(used, mixture, settings, seed=0)
    updates = settings.epochs * -(-len(used) // BATCH)
    bare = _Products(trainer, updates)
    ours, theirs = _Timed(lambda: _train_again(trainer, settings.epochs)), _Timed(bare.run)
    row = compare(
        f"training, {updates} steps of {BATCH} chains x {settings.steps} SGLD steps",
        ours,
        reference="the same matrix products in a bare loop",
        reference_call=theirs,
        limit=1.3,
        repeats=1,
    )
    note = (
        f"{len(used):,} x {COLUMNS} features, float32, {torch.get_num_threads()} threads; "
        f"processor time {ours.seconds:.1f} s beside {theirs.seconds:.1f} s, "
        f"ratio {ours.seconds / theirs.seconds:.3f}"
    )
    return [with_note(row, note), _reduced_precision(used, mixture, settings)]


@dataclass
class _Timed:
    """A call that keeps the processor time it took, which other work hardly changes."""

    call: Callable[[], None]
    seconds: float = math.nan

    def __call__(self) -> None:
        """Call it."""
        start = time.process_time()
        self.call()
        self.seconds = time.process_time() - start


def _train_again(trainer: EnergyTrainer, epochs: int) -> None:
    for _ in range(epochs):
        trainer.epoch()


def _reduced_precision(used: Tensor, mixture: GaussianMixture, settings: EnergySettings) -> Row:
    """Seconds of a shorter training with bfloat16 products, and the AUROC of both."""
    short = replace(settings, epochs=1, steps=5)
    known, near = features(2_000, seed=2)[0], features(2_000, seed=3, shift=0.01)[0]
    values = {}

    def train_with(precision: Literal["fp32", "bf16"]) -> None:
        chosen = replace(short, precision=precision)
        model = train(used, mixture, chosen, seed=0).model
        values[precision] = auroc(model(known), model(near))

    row = compare(
        "training with bfloat16 products",
        lambda: train_with("bf16"),
        reference="in float32",
        reference_call=lambda: train_with("fp32"),
        repeats=1,
    )
    points = 100 * (values["bf16"] - values["fp32"])
    return with_note(row, f"AUROC {100 * values['fp32']:.2f} in float32, {points:+.3f} points")


class _Products:
    """The matrix products of a training, on arrays of the same shapes, and nothing else."""

    def __init__(self, trainer: EnergyTrainer, updates: int) -> None:
        """Take shapes from `trainer`, and do as many steps as it does."""
        settings = trainer.settings
        self.updates, self.steps = updates, settings.steps
        self.weights = [w.detach() for w in trainer.network.weights]
        gaussians = trainer.mixture.gaussians
        self.whitener = gaussians.whitener.float()
        self.means = gaussians.whitened_means.float()
        self.spread = gaussians.spread.float()
        self.narrow = self._columns(settings.batch_size)
        self.wide = self._columns(2 * settings.batch_size)

    def _columns(self, rows: int) -> list[Tensor]:
        """An array for every layer's input and for the last one's output."""
        widths = [self.weights[0].shape[1], *(w.shape[0] for w in self.weights)]
        return [torch.full((rows, width), 0.01) for width in widths]

    def run(self) -> None:
        """All of it."""
        for _ in range(self.updates):
            torch.mm(self.narrow[0][:, : len(self.spread)], self.spread)
            for _ in range(self.steps):
                self._forward(self.narrow)
                self._back(self.narrow, weights=False)
                self._mixture(self.narrow[0])
            self._forward(self.wide)
            self._back(self.wide, weights=True)

    def _forward(self, arrays: list[Tensor]) -> None:
        for weight, inputs in zip(self.weights, arrays, strict=False):
            torch.mm(inputs, weight.T)

    def _back(self, arrays: list[Tensor], *, weights: bool) -> None:
        """To the chain's features, or to the weights of a batch whose features take none."""
        for place in reversed(range(len(self.weights))):
            if weights:
                torch.mm(arrays[place + 1].T, arrays[place])
            if place or not weights:
                torch.mm(arrays[place + 1], self.weights[place])

    def _mixture(self, rows: Tensor) -> None:
        whitened = torch.mm(rows, self.whitener)
        distances = torch.mm(whitened, self.means.T)
        torch.mm(distances, self.means)
        torch.mm(whitened, self.whitener.T)
