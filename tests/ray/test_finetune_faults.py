"""A killed worker and a killed driver end with the weights of an undisturbed run.

Both are held in the middle of training when they are killed (`tests.barrier`).
"""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune.loop import TrainingJob
from pipelines.finetune.stage import train
from pipelines.methods import METHODS
from tests.barrier import Barrier, wait_until
from tests.ray.processes import descendants, kill
from tests.ray.small_backbone import files, write_backbone
from tests.small_clip import toy_data

EPOCHS = 6
# The second epoch's state waits just before it replaces the first's.
CHECKPOINT = "cache/heads/*/checkpoint.pt"
TRAINING = {"epochs": EPOCHS, "batch_size": 16, "lr": 0.02}


def jobs():
    config = METHODS["ebm"].Config(head={"name": "coop", "num_context": 4}, training=TRAINING)
    return [TrainingJob(config, 0)]


def undisturbed(folder):
    storage = Storage(str(folder / "undisturbed"))
    backbone = write_backbone(folder)
    heads = train(jobs(), toy_data(), backbone, storage, compute=ComputeConfig(), mode="in_process")
    return backbone, heads[0], files(storage, heads[0])


def barrier_in(folder):
    return Barrier.new(folder / "barrier", held=CHECKPOINT, after=CHECKPOINT)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_ends_with_the_undisturbed_weights(tmp_path):
    backbone, head, expected = undisturbed(tmp_path)
    barrier = barrier_in(tmp_path)
    storage, epochs, killed = barrier.storage(str(tmp_path / "killed")), [], []

    def kill_once():
        killed.append(barrier.arrived())
        wait_until(lambda: epochs == [1.0])  # reports are not waited for
        kill(killed[0])
        barrier.open()

    killer = threading.Thread(target=kill_once)
    killer.start()
    heads = train(
        jobs(), toy_data(), backbone, storage, compute=ComputeConfig(),
        on_epoch=lambda _, report: epochs.append(report["epoch"]),
    )  # fmt: skip
    killer.join()
    assert len(killed) == 1
    assert heads == [head]
    assert files(storage, head) == expected
    # It went on in the middle: the first epoch was not trained again.
    assert epochs.count(1.0) == 1
    assert epochs[-1] == EPOCHS


DRIVER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import ray
from pipelines.compute.cluster import ComputeConfig
from pipelines.finetune.stage import train
from pipelines.backbones.description import BackboneConfig
from tests.barrier import Barrier
from tests.ray.test_finetune_faults import jobs
from tests.small_clip import toy_data
backbone = BackboneConfig.model_validate_json(sys.argv[1])
storage = Barrier(**json.loads(sys.argv[3])).storage(sys.argv[2])
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
train(jobs(), toy_data(), backbone, storage, compute=ComputeConfig())
"""


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_driver_started_again_ends_with_the_undisturbed_weights(tmp_path):
    backbone, head, expected = undisturbed(tmp_path)
    storage = Storage(str(tmp_path / "killed"))
    barrier = barrier_in(tmp_path)
    command = [sys.executable, "-c", DRIVER, backbone.model_dump_json(), storage.root,
               json.dumps(asdict(barrier))]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    below = []
    try:
        barrier.arrived(lambda: driver.poll() is None)
        below = descendants(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    finally:
        for pid in below:
            kill(pid)
        driver.kill()
    barrier.open()
    assert not storage.exists("cache", "heads", head, "manifest.json")
    heads = train(jobs(), toy_data(), backbone, storage, compute=ComputeConfig(), mode="in_process")
    assert heads == [head]
    assert files(storage, head) == expected
