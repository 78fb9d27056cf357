"""Lafon 2022's figures: no mode is lost by the correction, and the masses are what they say."""

import csv
import math

import numpy as np
import pytest
import torch

from pipelines import experiments as figures
from pipelines.experiments import energy_correction as figure
from pipelines.ood import GaussianMixture


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    summary = figures.run("energy_correction", folder)
    with (folder / "energy_correction.csv").open() as file:
        return folder, summary, list(csv.DictReader(file))


def biases(rows, model):
    return [float(row["mode bias"]) for row in rows if row["model"] == model]


@pytest.mark.slow  # a whole figure, 20 s
def test_mixture_and_corrected_model_keep_every_mode_and_feature_ebm_is_no_better(written):
    _, summary, rows = written
    assert len(rows) == 3 * len(figure.SEEDS) == 15
    for model in ("mixture", "corrected"):
        assert max(biases(rows, model)) <= 0.1
        least = [float(row["least mass"]) for row in rows if row["model"] == model]
        assert min(least) >= 0.5 / 9
    assert np.mean(biases(rows, "feature_ebm")) >= np.mean(biases(rows, "corrected"))
    for model in ("mixture", "feature_ebm", "corrected"):
        assert f"| {model} | {np.mean(biases(rows, model)):.3f} " in summary


@pytest.mark.slow
def test_both_pictures_are_written(written):
    folder, _, _ = written
    for kind in ("cross", "grid"):
        content = (folder / f"energy_correction_{kind}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000


def test_the_corrected_model_follows_the_arms_of_the_cross_and_the_mixture_does_not():
    mixture, trained = figure.fit("cross", 0, reference=True)
    # On an arm, and as far from the centre between the arms.
    on, off = torch.tensor([[0.9, 0.0]]), torch.tensor([[0.9, 0.9]]) / math.sqrt(2)
    assert float(trained.model(on)) > float(trained.model(off)) + 1
    assert abs(float(mixture(on)) - float(mixture(off))) < 0.3


def test_cell_masses_of_known_densities():
    even = figure.cell_masses(lambda z: torch.zeros(len(z), dtype=torch.float64))
    np.testing.assert_allclose(even, np.full(9, 1 / 9), rtol=1e-12)
    assert figure.mode_bias(even) == pytest.approx(0, abs=1e-12)
    # A narrow Gaussian in the cell of the largest x and y, three times as heavy in the middle.
    corner, middle = torch.tensor([4.0, 4.0]), torch.zeros(2)

    def energy(z):
        terms = [((z - c) ** 2).sum(dim=1) / 0.02 for c in (corner, middle)]
        return -torch.logsumexp(torch.stack([-terms[0], math.log(3) - terms[1]]), dim=0)

    masses = figure.cell_masses(energy)
    np.testing.assert_allclose(masses[[8, 4]], [0.25, 0.75], rtol=1e-6)
    assert figure.mode_bias(masses) == pytest.approx(0.75 - 1 / 9 + 0.25 - 1 / 9, rel=1e-6)


@pytest.mark.slow
def test_both_models_differ_only_in_where_chains_start():
    points, labels = figure.data("grid", 0)
    assert points.shape == (9 * figure.PER_CROSS, 2)
    centres = [points[labels == c].mean(dim=0) for c in range(9)]
    grid = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2)) * figure.SPACING
    assert (torch.stack(centres) - grid).abs().max() < 0.15
    mixture, corrected = figure.fit("grid", 0, reference=True)
    _, alone = figure.fit("grid", 0, reference=False)
    assert len(corrected.history) == len(alone.history) == figure.SETTINGS.epochs
    shapes = [
        [tuple(w.shape) for w in trained.model.network.weights] for trained in (corrected, alone)
    ]
    assert shapes[0] == shapes[1]
    assert isinstance(mixture, GaussianMixture)
