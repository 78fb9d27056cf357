"""The loop of networks: hand-computed updates, settings that reduce to others, going on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipelines.backbones.network_training import NetworkTraining
from pipelines.config import UserError
from pipelines.methods.base import TrainingConfig
from pipelines.ood import classifier_losses
from pipelines.train.batches import steps_of
from pipelines.train.loop import logits_of, train_network
from tests.train.toy import job, toy_data, toy_network

# All images in one step, so that its order does not matter.
ONE_STEP = TrainingConfig(
    epochs=1, batch_size=12, outlier_batch_size=None, lr=0.5, warmup_epochs=0, momentum=0.9,
    weight_decay=0.01,
)  # fmt: skip


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def energy(f):
    top = f.max(axis=1)
    return -(top + np.log(np.exp(f - top[:, None]).sum(axis=1)))


def numpy_loss(name, data, weight, bias, settings):
    """The loss of the whole data, written out in float64."""
    h = data.images.pixels.mean(axis=(1, 2)) / 255
    g = data.outliers.pixels.mean(axis=(1, 2)) / 255
    f, o = h @ weight.T + bias, g @ weight.T + bias
    p, q = softmax(f), softmax(o)
    if name == "logit_adjustment":
        raised = (np.bincount(data.labels) / len(f)) ** settings["tau"] * np.exp(f)
        p = raised / raised.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(f)), data.labels]).mean()
    if name in ("outlier_exposure", "pascl"):
        loss += settings.get("weight", 0.5) * -np.log(q).mean()
    if name == "energy_margin":
        inside = np.maximum(energy(f) - settings["m_in"], 0) ** 2
        outside = np.maximum(settings["m_out"] - energy(o), 0) ** 2
        loss += settings["weight"] * (inside.mean() + outside.mean())
    if name == "balanced_energy":
        # The prior is that of the network before training, so it is no part of the gradient.
        power = settings["prior"] ** settings["gamma"]
        z = q @ (power / power.sum())
        inside = np.maximum(energy(f) - settings["m_in"], 0) ** 2
        outside = np.maximum(settings["m_out"] + settings["alpha"] * z - energy(o), 0) ** 2
        loss += settings["weight"] * (inside.mean() + (z * outside).sum() / z.sum())
    if name == "oecc":
        gap = p.max(axis=1) - settings["train_accuracy"]
        loss += settings["confidence_weight"] * (gap**2).sum()
        loss += settings["outlier_weight"] * np.abs(q - 1 / 3).sum()
    if name == "open_sampling":
        drawn, shares = settings["drawn"], settings["complementary"]
        costs = -np.log(q[np.arange(len(o)), drawn])
        loss += settings["weight"] * (shares[drawn] * costs).sum() / shares[drawn].sum()
    return loss


def slopes(name, data, weight, bias, settings, step=1e-6):
    """Central differences of `numpy_loss` in W and b."""
    found = []
    for number, array in enumerate((weight, bias)):
        slope = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            sides = []
            for sign in (1, -1):
                moved = [weight.copy(), bias.copy()]
                moved[number][place] += sign * step
                sides.append(numpy_loss(name, data, *moved, settings))
            slope[place] = (sides[0] - sides[1]) / (2 * step)
        found.append(slope)
    return found


MARGINS = {"weight": 0.1, "m_in": -2.5, "m_out": -0.5}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cross_entropy", {}),
        ("outlier_exposure", {"weight": 0.5}),
        ("energy_margin", MARGINS),
        ("balanced_energy", {**MARGINS, "alpha": 2.0, "gamma": 0.5}),
        ("oecc", {"confidence_weight": 0.07, "outlier_weight": 0.05, "train_accuracy": 0.4}),
        ("open_sampling", {"weight": 1.0}),
        ("logit_adjustment", {"tau": 1.0}),
        ("logit_adjustment", {"tau": 0.5}),
        ("pascl", {"exposure_weight": 0.5}),
    ],
)
def test_one_step_is_the_one_computed_by_hand(name, settings, monkeypatch):
    data, network = toy_data(), toy_network()
    size = None if name in ("cross_entropy", "logit_adjustment") else 10
    config = ONE_STEP.model_copy(update={"outlier_batch_size": size})
    weight = network.linear.weight.detach().double().numpy().copy()
    bias = network.linear.bias.detach().double().numpy().copy()
    more = {}
    if name == "balanced_energy":
        outliers = data.outliers.pixels.mean(axis=(1, 2)) / 255 @ weight.T + bias
        more["prior"] = np.bincount(outliers.argmax(axis=1), minlength=3) / 10
    if name in ("open_sampling", "logit_adjustment"):
        data = replace(data, labels=np.array([0] * 6 + [1] * 4 + [2] * 2))
    if name == "open_sampling":
        drawn = np.array([0, 1, 2, 2, 2, 1, 0, 2, 2, 1])
        # What is drawn belongs to an outlier's place in the step, whatever its row.
        rows = steps_of(config, 12, 10, seed=0, epoch=1)[0].outlier_rows
        more = {"drawn": drawn, "complementary": np.array([2, 4, 6]) / 12}
        chosen = torch.from_numpy(drawn[rows])
        monkeypatch.setattr(classifier_losses, "draw_labels", lambda *_, **__: chosen)
    trained = train_network(job(name, config, **settings), data, network)
    d_weight, d_bias = slopes(name, data, weight, bias, {**settings, **more})
    assert np.abs(d_weight).max() > 1e-3
    # SGD with decay; the first step of momentum is the gradient itself.
    assert trained.state["fc.weight"].numpy() == pytest.approx(
        weight - 0.5 * (d_weight + 0.01 * weight), abs=2e-6
    )
    assert trained.state["fc.bias"].numpy() == pytest.approx(
        bias - 0.5 * (d_bias + 0.01 * bias), abs=2e-6
    )


class NormThenMean(nn.Module):
    """Colours mixed by a matrix, batch normalisation, the means over the image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.mix = nn.Conv2d(3, 3, 1, bias=True)
        self.bn = nn.BatchNorm2d(3)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([1.5, 0.5, 2.0]))
            self.bn.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, pixels):
        return self.bn(self.mix(pixels)).mean(dim=(2, 3))


def stage_2_loss(data, mix, norm, linear, tau):
    """Adjusted cross-entropy in float64; and the batch's statistics."""
    x = data.images.pixels / 255 @ mix[0].T + mix[1]
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    h = ((x - mean) / np.sqrt(variance + 1e-5) * norm[0] + norm[1]).mean(axis=(1, 2))
    f = h @ linear[0].T + linear[1]
    raised = (np.bincount(data.labels) / len(f)) ** tau * np.exp(f)
    chosen = raised[np.arange(len(f)), data.labels] / raised.sum(axis=1)
    count = x[..., 0].size
    return -np.log(chosen).mean(), mean, variance * count / (count - 1)


def test_norm_and_last_moves_these_as_by_hand_and_nothing_else():
    data = replace(toy_data(), labels=np.array([0] * 6 + [1] * 4 + [2] * 2))
    network = toy_network(NormThenMean())
    before = {name: value.double().numpy() for name, value in network.state().items()}
    work = job("logit_adjustment", ONE_STEP, parameters="norm_and_last", tau=1.0)
    after = train_network(work, data, network).state
    mix = before["mix.weight"][:, :, 0, 0], before["mix.bias"]
    names = ("bn.weight", "bn.bias", "fc.weight", "fc.bias")
    arrays = [before[name].copy() for name in names]
    for name, array in zip(names, arrays, strict=True):
        slope = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-6, -1e-6):
                array[place] += step
                ends.append(stage_2_loss(data, mix, arrays[:2], arrays[2:], 1.0)[0])
                array[place] -= step
            slope[place] = (ends[0] - ends[1]) / 2e-6
        assert np.abs(slope).max() > 1e-3
        expected = before[name] - 0.5 * (slope + 0.01 * before[name])
        assert after[name].numpy() == pytest.approx(expected, abs=2e-6)
    # No decay either: what is frozen keeps its bytes.
    for name in ("mix.weight", "mix.bias"):
        assert after[name].double().numpy().tolist() == before[name].tolist()
    # The statistics follow the batch.
    _, mean, variance = stage_2_loss(data, mix, arrays[:2], arrays[2:], 1.0)
    assert after["bn.running_mean"].numpy() == pytest.approx(0.1 * mean, abs=1e-6)
    assert after["bn.running_var"].numpy() == pytest.approx(0.9 + 0.1 * variance, abs=1e-6)


def test_layers_that_are_frozen_drop_nothing():
    network = toy_network(convolutions(), 8)
    network.train_norm_and_last()
    for mode in (True, False):
        network.train(mode)
        modes = {type(layer).__name__: layer.training for layer in network.trunk}
        assert modes.pop("BatchNorm2d") == mode
        assert not any(modes.values())
        assert network.linear.training == network.training == mode


def test_norm_and_last_goes_on_from_a_checkpoint_with_the_same_bytes():
    work = job("logit_adjustment", SEVERAL, parameters="norm_and_last")
    whole = train_network(work, toy_data(), toy_network(convolutions(), 8))
    checkpoint = Kept(1)
    with pytest.raises(KeyboardInterrupt):
        train_network(work, toy_data(), toy_network(convolutions(), 8), checkpoint=checkpoint)
    again = train_network(work, toy_data(), toy_network(convolutions(), 8), checkpoint=checkpoint)
    assert all(torch.equal(again.state[key], value) for key, value in whole.state.items())
    assert torch.equal(whole.state["0.weight"], toy_network(convolutions(), 8).state()["0.weight"])


def test_norm_and_last_of_drawn_weights_is_refused():
    with pytest.raises(ValidationError, match=r"would stay as it was drawn; allowed .*: all"):
        NetworkTraining(start="random", parameters="norm_and_last")


def test_contrast_moves_what_lies_before_the_projection():
    settings = {"exposure_weight": 0.0, "contrast_weight": 0.0}
    states = []
    for weight in (0.0, 1.0):
        work = job("pascl", SEVERAL, **{**settings, "contrast_weight": weight})
        states.append(train_network(work, toy_data(), toy_network(convolutions(), 8)))
    plain, pulled = states
    assert pulled.history[0]["loss/contrast"] > 0
    assert not torch.equal(plain.state["0.weight"], pulled.state["0.weight"])


SEVERAL = TrainingConfig(epochs=2, batch_size=5, lr=0.1, warmup_epochs=0)


def final(name, data=None, **settings):
    config = SEVERAL
    return train_network(job(name, config, **settings), data or toy_data(), toy_network()).state


def test_a_strength_of_0_is_cross_entropy():
    plain, other = final("cross_entropy"), final("logit_adjustment", tau=0)
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("name", ["outlier_exposure", "energy_margin", "balanced_energy"])
def test_a_weight_of_0_is_cross_entropy(name):
    plain, other = final("cross_entropy"), final(name, weight=0)
    assert all(torch.equal(plain[key], other[key]) for key in plain)


def test_balanced_energy_without_balance_is_energy_margin():
    margins = {"m_in": -2.5, "m_out": -0.5, "weight": 1.0}
    plain = final("energy_margin", **margins)
    other = final("balanced_energy", alpha=0, gamma=0, **margins)
    for key, value in plain.items():
        assert other[key].numpy() == pytest.approx(value.numpy(), abs=1e-6)


def convolutions():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


class Kept:
    """A checkpoint in memory; a training that saves for the n-th time is stopped by it."""

    def __init__(self, stop_at):
        self.content, self.saves, self.stop_at = None, 0, stop_at

    def load(self):
        return self.content

    def save(self, content):
        self.content, self.saves = content, self.saves + 1
        if self.saves == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_training_that_was_stopped_ends_with_the_same_bytes(stop_at, average, monkeypatch):
    monkeypatch.setattr("pipelines.train.loop.PAUSE", 0.0)  # save after every step
    work = job("energy_margin", SEVERAL, average=average)
    whole = train_network(work, toy_data(), toy_network(convolutions(), 8))
    checkpoint = Kept(stop_at)
    with pytest.raises(KeyboardInterrupt):
        train_network(work, toy_data(), toy_network(convolutions(), 8), checkpoint=checkpoint)
    again = train_network(work, toy_data(), toy_network(convolutions(), 8), checkpoint=checkpoint)
    assert again.history == whole.history
    assert all(torch.equal(again.state[key], value) for key, value in whole.state.items())
    assert checkpoint.saves > stop_at


def test_accumulated_parts_are_the_whole_batch():
    settings = {"m_in": -2.5, "m_out": -0.5, "weight": 1.0}
    parts = SEVERAL.model_copy(update={"accumulate": 3, "batch_size": 6, "outlier_batch_size": 6})
    whole = parts.model_copy(update={"accumulate": 1})
    one, three = (
        train_network(job("energy_margin", config, **settings), toy_data(), toy_network()).state
        for config in (whole, parts)
    )
    for key, value in one.items():
        assert three[key].numpy() == pytest.approx(value.numpy(), abs=1e-6)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    data = toy_data()
    train_network(job("cross_entropy", SEVERAL), data, toy_network())
    seen = np.concatenate(data.images.reads).reshape(2, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in seen)
    assert list(seen[0]) != list(seen[1])


def test_a_loss_that_is_no_number_names_the_epoch_and_the_learning_rate():
    config = SEVERAL.model_copy(update={"lr": 1e30, "epochs": 3})
    with pytest.raises(UserError, match=r"epoch \d.*smaller training\.lr"):
        train_network(job("cross_entropy", config), toy_data(), toy_network())


def test_outliers_that_are_needed_and_missing_are_said():
    with pytest.raises(UserError, match="learns from outliers"):
        train_network(job("outlier_exposure", SEVERAL), toy_data(outliers=0), toy_network())


def test_reports_have_losses_and_validation():
    history = train_network(job("energy_margin", SEVERAL), toy_data(), toy_network()).history
    assert [report["epoch"] for report in history] == [1, 2]
    assert {"loss", "loss/cross_entropy", "loss/margin", "lr", "validation/accuracy"} <= set(
        history[0]
    )


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_look_at_the_network_under_way_changes_nothing(average):
    work = job("energy_margin", SEVERAL, average=average)
    whole = train_network(work, toy_data(), toy_network(convolutions(), 8))
    data, seen = toy_data(), []

    def look(epoch, network):
        right = logits_of(network, data.validation).argmax(dim=1).numpy() == data.validation_labels
        seen.append((epoch, float(right.mean()), network.state()))

    watched = train_network(work, data, toy_network(convolutions(), 8), on_network=look)
    assert watched.history == whole.history
    for key, value in whole.state.items():
        assert torch.equal(watched.state[key], value)
        assert torch.equal(seen[-1][2][key], value)
    assert [(epoch, accuracy) for epoch, accuracy, _ in seen] == [
        (report["epoch"], pytest.approx(report["validation/accuracy"])) for report in whole.history
    ]


def test_the_moving_average_of_the_weights_is_kept():
    config = SEVERAL.model_copy(update={"batch_size": 12, "epochs": 3})
    seen = []
    network = toy_network()
    step = torch.optim.SGD.step

    def watched(optimizer, *args, **more):
        step(optimizer, *args, **more)
        seen.append(network.linear.weight.detach().double().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)
        work = job("cross_entropy", config, average=0.75)
        kept = train_network(work, toy_data(), network).state["fc.weight"]
    assert len(seen) == 3
    expected = seen[0]  # the average starts with the first update
    for weights in seen[1:]:
        expected = 0.75 * expected + 0.25 * weights
    assert kept.numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert not torch.equal(kept, network.linear.weight)
