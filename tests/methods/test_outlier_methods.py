"""Methods that learn from outliers: losses by hand, margins and priors from data, reductions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipelines.config import UserError
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.methods import METHODS
from pipelines.methods.base import Batch, Initial, Outputs
from tests.small_clip import small_clip, toy_data

NAMES = ["energy_margin", "outlier_exposure", "balanced_energy"]
LOGITS = [[4.0, 1.0, 0.0], [0.5, 3.0, 1.0]]
OUTLIERS = [[1.0, 0.5, 0.0], [2.0, 0.0, 1.0], [0.1, 0.2, 0.3]]
LABELS = [0, 1]
PREPARED = {
    "m_in": torch.tensor(-3.5),
    "m_out": torch.tensor(-2.0),
    "prior": torch.tensor([0.6, 0.3, 0.1]),
}


def losses_of(name, **settings):
    config = METHODS[name].Config(**settings)
    outputs = Outputs(
        similarity=torch.tensor(LOGITS) / 10,
        logits=torch.tensor(LOGITS),
        image_features=torch.zeros(2, 4),
        text_features=None,
        outlier_similarity=torch.tensor(OUTLIERS) / 10,
        outlier_logits=torch.tensor(OUTLIERS),
        logit_scale=10.0,
    )
    batch = Batch(torch.tensor(LABELS), prepared=PREPARED)
    return METHODS[name].loss(outputs, batch, config)


def logsumexp(row):
    return math.log(sum(map(math.exp, row)))


def mean(values):
    return sum(values) / len(values)


def test_energy_margin_by_hand():
    losses, report = losses_of("energy_margin", weight=0.3)
    images = [max(0.0, -logsumexp(row) + 3.5) ** 2 for row in LOGITS]
    outliers = [max(0.0, -2.0 + logsumexp(row)) ** 2 for row in OUTLIERS]
    expected = mean(images) + mean(outliers)
    assert expected > 0.01
    assert float(losses["margin"]) == pytest.approx(0.3 * expected, rel=1e-5)
    assert report["margin"] == pytest.approx(expected, rel=1e-5)
    assert report["energy"] == pytest.approx(-mean([logsumexp(r) for r in LOGITS]), rel=1e-5)
    entropy = mean([logsumexp(row) - row[y] for row, y in zip(LOGITS, LABELS, strict=True)])
    assert float(losses["cross_entropy"]) == pytest.approx(entropy, rel=1e-5)


def test_the_single_hinge_holds_the_gap_of_the_means():
    losses, _ = losses_of("energy_margin", weight=1.0, hinge="single")
    gap = -mean([logsumexp(row) for row in LOGITS]) + mean([logsumexp(row) for row in OUTLIERS])
    expected = max(0.0, gap + 1.5)  # m_out - m_in = 1.5
    assert float(losses["margin"]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_outlier_exposure_by_hand():
    losses, _ = losses_of("outlier_exposure", weight=0.5)
    expected = mean([logsumexp(row) - mean(row) for row in OUTLIERS])
    assert float(losses["exposure"]) == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["weighted", "mean"])
def test_balanced_energy_by_hand(reduction):
    settings = {"weight": 1.0, "alpha": 2.0, "gamma": 0.5, "reduction": reduction}
    losses, _ = losses_of("balanced_energy", **settings)
    powers = [p**0.5 for p in (0.6, 0.3, 0.1)]
    shares = [p / sum(powers) for p in powers]
    weights, terms = [], []
    for row in OUTLIERS:
        softmax = [math.exp(v) / math.exp(logsumexp(row)) for v in row]
        z = sum(a * b for a, b in zip(softmax, shares, strict=True))
        weights.append(z)
        terms.append(z * max(0.0, -2.0 + 2.0 * z + logsumexp(row)) ** 2)
    divisor = sum(weights) if reduction == "weighted" else len(OUTLIERS)
    images = mean([max(0.0, -logsumexp(row) + 3.5) ** 2 for row in LOGITS])
    assert float(losses["margin"]) == pytest.approx(images + sum(terms) / divisor, rel=1e-5)


def test_margins_come_from_the_mean_energies_unless_given():
    initial = Initial(torch.tensor(LOGITS), torch.tensor(OUTLIERS))
    found = METHODS["energy_margin"].prepare(METHODS["energy_margin"].Config(), initial)
    assert float(found["m_in"]) == pytest.approx(-mean([logsumexp(r) for r in LOGITS]), rel=1e-5)
    assert float(found["m_out"]) == pytest.approx(-mean([logsumexp(r) for r in OUTLIERS]), rel=1e-5)
    config = METHODS["energy_margin"].Config(m_in=-9.0, m_out=-4.0)
    given = METHODS["energy_margin"].prepare(config, initial)
    assert (float(given["m_in"]), float(given["m_out"])) == (-9.0, -4.0)


def test_the_prior_is_measured_on_the_outliers_or_taken_from_a_pass_over_all():
    config = METHODS["balanced_energy"].Config()
    initial = Initial(torch.tensor(LOGITS), torch.tensor(OUTLIERS))
    measured = METHODS["balanced_energy"].prepare(config, initial)["prior"]
    assert measured.tolist() == pytest.approx([2 / 3, 0.0, 1 / 3])  # predicted 0, 0, 2
    counted = Initial(torch.tensor(LOGITS), torch.tensor(OUTLIERS), torch.tensor([1, 8, 1]))
    taken = METHODS["balanced_energy"].prepare(config, counted)["prior"]
    assert taken.tolist() == pytest.approx([0.1, 0.8, 0.1])


@pytest.mark.parametrize("name", ["energy_margin", "balanced_energy"])
def test_margins_in_the_wrong_order_or_alone_are_refused(name):
    with pytest.raises(ValidationError, match=r"m_in=-4\.0 must be below m_out=-9\.0"):
        METHODS[name].Config(m_in=-4.0, m_out=-9.0)
    with pytest.raises(ValidationError, match="give both m_in and m_out"):
        METHODS[name].Config(m_in=-4.0)


@pytest.mark.parametrize("name", NAMES)
def test_no_outliers_are_refused_before_training(name):
    data = dataclasses.replace(toy_data(), outliers=None)
    with pytest.raises(UserError, match=f"method={name} learns from outliers"):
        train_in_process(TrainingJob(METHODS[name].Config(), 0), data, small_clip())


def weights_of(name, **settings):
    training = {"epochs": 3, "batch_size": 16, "lr": 0.02}
    if METHODS[name].Config.needs_outliers:
        training["outlier_batch_size"] = 16
    head = {"name": "coop", "num_context": 4}
    config = METHODS[name].Config(head=head, training=training, **settings)
    result = train_in_process(TrainingJob(config, 0), toy_data(), small_clip())
    return result.last.arrays["text_features"]


def test_balanced_energy_without_alpha_and_gamma_is_energy_margin():
    plain = weights_of("energy_margin", weight=1.0)
    reduced = weights_of("balanced_energy", weight=1.0, alpha=0.0, gamma=0.0)
    other = weights_of("balanced_energy", weight=1.0, alpha=10.0, gamma=1.0)
    assert np.abs(plain - reduced).max() < 1e-5
    assert np.abs(plain - other).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_weight_zero_is_coop_to_the_last_bit(name):
    assert np.array_equal(weights_of(name, weight=0.0), weights_of("coop"))


@pytest.mark.parametrize("name", NAMES)
def test_training_drives_outliers_apart(name):
    config = METHODS[name].Config(
        head={"name": "linear_probe", "init": "text"},
        weight=1.0,
        training={"epochs": 20, "batch_size": 32, "outlier_batch_size": 32, "lr": 0.05},
    )
    result = train_in_process(TrainingJob(config, 0), toy_data(), small_clip())
    term = "loss/exposure" if name == "outlier_exposure" else "loss/margin"
    first, last = result.history[1][term], result.history[-1][term]
    if name == "outlier_exposure":
        first, last = first - math.log(4), last - math.log(4)  # log K is its least value
    assert last < 0.7 * first
