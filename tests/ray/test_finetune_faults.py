"""A killed worker and a killed driver end with the weights of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune.loop import TrainingJob
from pipelines.finetune.stage import train
from pipelines.methods import METHODS
from tests.ray.processes import descendants, kill, title
from tests.ray.small_backbone import files, write_backbone
from tests.small_clip import toy_data

# Long enough that the kill comes in the middle.
EPOCHS = 150
TRAINING = {"epochs": EPOCHS, "batch_size": 16, "lr": 0.02}


def jobs():
    config = METHODS["ebm"].Config(head={"name": "coop", "num_context": 4}, training=TRAINING)
    return [TrainingJob(config, 0)]


def undisturbed(folder):
    storage = Storage(str(folder / "undisturbed"))
    backbone = write_backbone(folder)
    heads = train(jobs(), toy_data(), backbone, storage, compute=ComputeConfig(), mode="in_process")
    return backbone, heads[0], files(storage, heads[0])


def train_workers():
    """The Ray Train workers below this process."""
    return [pid for pid in descendants(os.getpid()) if "RayTrainWorker" in title(pid)]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_ends_with_the_undisturbed_weights(tmp_path):
    backbone, head, expected = undisturbed(tmp_path)
    storage, epochs, killed = Storage(str(tmp_path / "killed")), [], []

    def kill_once(_, report):
        epochs.append(report["epoch"])
        if report["epoch"] >= 10 and not killed:
            for pid in train_workers():
                kill(pid)
                killed.append(pid)

    heads = train(
        jobs(), toy_data(), backbone, storage, compute=ComputeConfig(), on_epoch=kill_once
    )
    assert len(killed) == 1
    assert heads == [head]
    assert files(storage, head) == expected
    # It went on in the middle: no epoch before the tenth was trained again.
    assert epochs.count(1.0) == 1
    assert epochs[-1] == EPOCHS


DRIVER = """
import sys, warnings
warnings.simplefilter("ignore")
import ray
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune import train
from pipelines.backbones.clip import BackboneConfig
from tests.ray.test_finetune_faults import jobs
from tests.small_clip import toy_data
backbone = BackboneConfig.model_validate_json(sys.argv[1])
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
train(jobs(), toy_data(), backbone, Storage(sys.argv[2]), compute=ComputeConfig())
"""


@pytest.mark.slow
def test_a_killed_driver_started_again_ends_with_the_undisturbed_weights(tmp_path):
    backbone, head, expected = undisturbed(tmp_path)
    storage = Storage(str(tmp_path / "killed"))
    command = [sys.executable, "-c", DRIVER, backbone.model_dump_json(), storage.root]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    below = []
    try:
        checkpoint = storage.local("cache", "heads", head, "checkpoint.pt")
        deadline = time.monotonic() + 240
        while not checkpoint.exists() and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert checkpoint.exists()
        below = descendants(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    finally:
        for pid in below:
            kill(pid)
        driver.kill()
    assert not storage.exists("cache", "heads", head, "manifest.json")
    heads = train(jobs(), toy_data(), backbone, storage, compute=ComputeConfig(), mode="in_process")
    assert heads == [head]
    assert files(storage, head) == expected
