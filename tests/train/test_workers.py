"""Two workers give one worker's weights: two real processes, gloo, no Ray."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.heads.parallel import Workers
from pipelines.methods.base import TrainingConfig
from pipelines.train.loop import train_network
from tests.patience import PATIENCE
from tests.train.toy import job, toy_data, toy_network

WORLD = 2
# Batches of 4, 4 and 3 images and of 7 outliers, which do not divide by two.
TRAINING = TrainingConfig(
    epochs=2, batch_size=5, outlier_batch_size=7, lr=0.1, warmup_epochs=0, accumulate=1
)
MARGINS = {"m_in": -2.5, "m_out": -0.5, "weight": 1.0}
# Losses that are no mean over images are among them: Z's mean, sums, pairs of images.
JOBS = {
    "energy_margin": job("energy_margin", TRAINING, **MARGINS),
    "balanced_energy": job("balanced_energy", TRAINING, **MARGINS, alpha=1.0, gamma=0.5),
    "oecc": job("oecc", TRAINING),
    "open_sampling": job("open_sampling", TRAINING),
    "pascl": job("pascl", TRAINING),
    "logit_adjustment": job(
        "logit_adjustment",
        TRAINING.model_copy(update={"outlier_batch_size": None}),
        parameters="norm_and_last",
    ),
}


def convolution() -> nn.Module:
    """Without batch normalisation, which sees a worker's own part of a batch."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def trained(workers: Workers) -> dict[str, dict[str, Tensor]]:
    return {
        name: train_network(
            work, toy_data(11), toy_network(convolution(), 8), workers=workers
        ).state
        for name, work in JOBS.items()
    }


def work(rank: int, place: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{place}/meet", rank=rank, world_size=WORLD
        )
        (Path(place) / f"{rank}.pkl").write_bytes(pickle.dumps(trained(Workers(rank, WORLD))))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    place = tmp_path_factory.mktemp("workers")
    start = multiprocessing.get_context("spawn")
    processes = [start.Process(target=work, args=(rank, str(place))) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    return [pickle.loads((place / f"{rank}.pkl").read_bytes()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", JOBS)
def test_two_workers_end_with_the_weights_of_one(
    name: str, both: list[dict[str, dict[str, Tensor]]]
) -> None:
    alone = train_network(JOBS[name], toy_data(11), toy_network(convolution(), 8)).state
    before = toy_network(convolution(), 8).state()
    assert any(not torch.equal(alone[key], before[key]) for key in alone)
    for key, value in alone.items():
        np.testing.assert_allclose(both[0][name][key], value, rtol=1e-4, atol=2e-6)
        assert torch.equal(both[0][name][key], both[1][name][key])
