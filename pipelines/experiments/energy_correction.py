"""Figures 1 and 2 of the energy-correction paper (Lafon 2022): what the correction adds.

Data in the plane: one cross (two long, narrow Gaussians at right angles) and nine crosses on a
3 x 3 grid, a class each. Three models of each: the Gaussian mixture, the energy-based model in
feature space by itself (`feature_ebm`) and the corrected mixture. Both trained models have the
same network, the same number of optimiser steps and the same sampler, tuned for this plane
(noise^2 = 2 x step, so that it is Langevin's); only where chains start differs, from the mixture
or from a normal distribution as wide as the data.

Mode bias: with m_i the mass that exp(-E) puts into square i of the grid (by quadrature over the
box that the nine squares fill, outside of which the density of `feature_ebm` is not even
normalisable), the total variation 1/2 sum_i |m_i - 1/9|. 0 is even, 8/9 is all in one square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.axes import Axes
from torch import Tensor

from pipelines.ood import EnergySettings, GaussianMixture
from pipelines.ood.energy_training import Trained, train
from pipelines.plots import COLOURS, MUTED, label, markdown_table, panels, save, write_csv

SEEDS = range(5)
# Between crosses; standard deviations along and across an arm.
SPACING, LONG, SHORT = 4.0, 0.8, 0.15
PER_CROSS = 150
# T_G = 2 makes exp(-E_G / T_G) a component's own Gaussian: Lafon 2022 writes E_G without the 1/2.
SETTINGS = EnergySettings(
    T_G=2.0,
    l2_weight=0.05,
    steps=10,
    step_size=(2e-2, 2e-3),
    noise=(0.2, 0.063),
    input_noise=0.02,
    initial_std=SPACING,
    epochs=30,
    batch_size=256,
    lr=2e-3,
    width=64,
    hidden=5,
)
_NODES = 20  # of the quadrature, to a unit of length
_SHOWN = 12.0  # energies above the lowest that pictures distinguish

Energy = Callable[[Tensor], Tensor]


def cross(count: int, generator: torch.Generator) -> Tensor:
    """Points (count, 2) of a cross at the origin, half of them on either arm."""
    points = torch.randn(count, 2, generator=generator)
    points *= torch.tensor([LONG, SHORT])
    points[count // 2 :] = points[count // 2 :].flip(1)
    return points


def grid_of_crosses(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (9 x PER_CROSS, 2) of nine crosses, and the number of each one's cross."""
    places = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)) * SPACING
    points = torch.cat([cross(PER_CROSS, generator) + place for place in places])
    return points, torch.arange(9).repeat_interleave(PER_CROSS)


def data(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Points and labels: `cross` is one class, `grid` is nine."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "grid":
        return grid_of_crosses(generator)
    # As many points as the grid has, so that both see the same number of steps.
    return cross(9 * PER_CROSS, generator), torch.zeros(9 * PER_CROSS, dtype=torch.long)


@cache
def fit(kind: str, seed: int, *, reference: bool) -> tuple[GaussianMixture, Trained]:
    """The mixture, and the model trained with (`reference`) or without it."""
    points, labels = data(kind, seed)
    mixture = GaussianMixture.fit(points, labels, T_G=SETTINGS.T_G)
    start = SETTINGS.initial_std if kind == "grid" else LONG
    settings = replace(SETTINGS, reference=reference, initial_std=start)
    return mixture, train(points, mixture, settings, seed=seed)


def cell_masses(energy: Energy) -> Tensor:
    """The share of exp(-E) in each of the nine cells, (9,), by the midpoint rule in the box."""
    side = int(3 * SPACING * _NODES)
    nodes = (torch.arange(side, dtype=torch.float64) + 0.5) / _NODES - 1.5 * SPACING
    log_density = -energy(torch.cartesian_prod(nodes, nodes))
    density = (log_density - log_density.max()).exp().reshape(side, side)
    cells = density.reshape(3, side // 3, 3, side // 3).sum(dim=(1, 3))
    return (cells / cells.sum()).flatten()


def mode_bias(masses: Tensor) -> float:
    """Total variation between the cells' masses and 1/9."""
    return float(0.5 * (masses - 1 / 9).abs().sum())


@dataclass(frozen=True)
class Outcome:
    """One model of the grid under one seed."""

    model: str
    seed: int
    bias: float
    least: float
    most: float
    coverage: float | None


def outcomes(seed: int) -> list[Outcome]:
    """Mixture, corrected model and `feature_ebm` of the grid."""
    found = []
    for name, reference in (("corrected", True), ("feature_ebm", False)):
        mixture, trained = fit("grid", seed, reference=reference)
        coverage = trained.history[-1]["coverage"]
        if reference:
            found.append(_outcome("mixture", seed, _energy_of(mixture), None))
        found.append(_outcome(name, seed, trained.model.energy, coverage))
    return found


def _energy_of(mixture: GaussianMixture) -> Energy:
    return lambda z: -mixture(z)


def _outcome(model: str, seed: int, energy: Energy, coverage: float | None) -> Outcome:
    with torch.no_grad():
        masses = cell_masses(energy)
    least, most = float(masses.min()), float(masses.max())
    return Outcome(model, seed, mode_bias(masses), least, most, coverage)


def run(folder: Path) -> str:
    """Write energy_correction_{cross,grid}.png and energy_correction.csv; return the summary."""
    for kind in ("cross", "grid"):
        _draw(kind, folder / f"energy_correction_{kind}.png")
    found = [outcome for seed in SEEDS for outcome in outcomes(seed)]
    header = ["model", "seed", "mode bias", "least mass", "most mass", "coverage of samples"]
    rows = [[o.model, o.seed, o.bias, o.least, o.most, _or_dash(o.coverage)] for o in found]
    write_csv(folder / "energy_correction.csv", header, rows)
    return _summary(found)


def _or_dash(value: float | None) -> float | str:
    return "-" if value is None else value


def _summary(found: list[Outcome]) -> str:
    rows = []
    for name in ("mixture", "feature_ebm", "corrected"):
        chosen = [outcome for outcome in found if outcome.model == name]
        biases = [outcome.bias for outcome in chosen]
        rows.append(
            [
                name,
                f"{mean(biases):.3f} ({stdev(biases):.3f})",
                f"{max(biases):.3f}",
                f"{9 * min(o.least for o in chosen):.2f} / 9",
                f"{9 * max(o.most for o in chosen):.2f} / 9",
            ]
        )
    header = ["model", "mode bias, mean (std)", "largest", "least square", "fullest square"]
    table = markdown_table(header, rows)
    return f"Nine crosses, {len(SEEDS)} seeds; every square's true mass is 1/9:\n\n{table}"


def _draw(kind: str, path: Path) -> None:
    """Energies of the mixture, `feature_ebm`, the correction alone and the corrected model."""
    points, _ = data(kind, 0)
    mixture, corrected = fit(kind, 0, reference=True)
    _, alone = fit(kind, 0, reference=False)
    network = corrected.model.network
    half = 1.5 * SPACING if kind == "grid" else 2.5
    figure, axes = panels(4, width=3.0, height=3.1)
    energies: list[tuple[str, Energy]] = [
        ("Gaussian mixture", _energy_of(mixture)),
        ("feature_ebm", alone.model.energy),
        ("the correction alone", network),
        ("corrected mixture", corrected.model.energy),
    ]
    for panel, (title, energy) in zip(axes, energies, strict=True):
        _map(panel, energy, half)
        label(panel, title=title, x="", y="")
    x, y = points[::4].T.numpy()
    axes[0].scatter(x, y, s=1, color=COLOURS[1], linewidths=0, alpha=0.6)
    save(figure, path)


def _map(panel: Axes, energy: Energy, half: float) -> None:
    """Energy over a square, from its lowest value (dark) up."""
    nodes = torch.linspace(-half, half, 200, dtype=torch.float64)
    with torch.no_grad():
        values = energy(torch.cartesian_prod(nodes, nodes)).reshape(200, 200).T
    above = (values - values.min()).clamp(max=_SHOWN).numpy()
    extent = (-half, half, -half, half)
    panel.imshow(above, origin="lower", extent=extent, cmap="Blues_r", vmin=0, vmax=_SHOWN)
    panel.set_xlim(-half, half)
    panel.set_ylim(-half, half)
    panel.tick_params(labelsize=7, colors=MUTED)
