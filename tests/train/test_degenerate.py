"""Settings that reduce a method to a simpler one, and trainings that go wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipelines.config import UserError
from pipelines.methods.base import TrainingConfig
from pipelines.train.data import NetworkData, NetworkJob
from pipelines.train.loop import train_network
from tests.train.toy import job, toy_data, toy_network

SEVERAL = TrainingConfig(
    epochs=2, batch_size=5, outlier_batch_size=None, lr=0.1, warmup_epochs=0, momentum=0.9
)
NO_WEIGHT = {
    "oecc": {"confidence_weight": 0, "outlier_weight": 0},
    "open_sampling": {"weight": 0},
    "pascl": {"exposure_weight": 0, "contrast_weight": 0},
}


def smooth() -> nn.Module:
    """Images to activations, without statistics of a batch or anything drawn."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def final(name: str, **settings: object) -> dict[str, Tensor]:
    work = job(name, SEVERAL, **settings)
    return train_network(work, toy_data(), toy_network(smooth(), 8)).state


@pytest.mark.parametrize("name", NO_WEIGHT)
def test_without_weight_it_is_cross_entropy(name: str) -> None:
    plain, other = final("cross_entropy"), final(name, **NO_WEIGHT[name])
    started = toy_network(smooth(), 8).state()
    assert not torch.equal(plain["fc.weight"], started["fc.weight"])
    for key, value in plain.items():
        assert other[key].numpy() == pytest.approx(value.numpy(), abs=1e-6)


def test_pascl_of_one_view_without_contrast_is_outlier_exposure() -> None:
    # Images are not augmented, so both views are the image itself.
    plain = final("outlier_exposure", weight=0.5)
    other = final("pascl", contrast_weight=0, exposure_weight=0.5)
    assert not torch.equal(plain["fc.weight"], final("cross_entropy")["fc.weight"])
    for key, value in plain.items():
        assert other[key].numpy() == pytest.approx(value.numpy(), abs=1e-6)


def refused(work: NetworkJob, data: NetworkData) -> str:
    """What a training that goes wrong says: one line."""
    with pytest.raises(UserError) as caught:
        train_network(work, data, toy_network())
    (line,) = str(caught.value).splitlines()
    return line


def test_a_loss_of_nan_names_the_epoch_the_learning_rate_and_what_to_try() -> None:
    config = SEVERAL.model_copy(update={"lr": 1e30, "epochs": 3, "warmup_epochs": 1})
    line = refused(job("cross_entropy", config), toy_data())
    # Three steps an epoch: this is the third after warm-up, 1e30 (1 + cos(pi 2 / 6)) / 2.
    assert "loss is nan at step 3 of epoch 2, learning rate 7.5e+29" in line
    for word in ("method=cross_entropy", "smaller training.lr", "longer training.warmup_epochs"):
        assert word in line


@pytest.mark.parametrize("name", ["cross_entropy", "energy_margin"])
@pytest.mark.parametrize("num_validation", [0, 6])
def test_what_the_last_step_made_of_the_weights_is_looked_at(
    name: str, num_validation: int
) -> None:
    """No loss follows on it: infinite weights were kept, and a record that none could read."""
    wild = {"lr": 3e38, "epochs": 1, "batch_size": 12, "weight_decay": 5.0}
    data = toy_data()
    labels = data.validation_labels[:num_validation]
    work = job(name, SEVERAL.model_copy(update=wild))
    line = refused(work, replace(data, validation_labels=labels))
    assert "a weight is no number after epoch 1, learning rate 3e+38" in line
    assert "smaller training.lr" in line
