"""Training killed in the middle of several heads: finished ones are found, not trained again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.data.storage import Storage
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
# Jobs of 3, 3 and 60 epochs; each finished epoch is a line: which job, which epoch. After the
# epoch that it is told to stop at, of the third job, it waits to be killed.
DRIVER = """
import sys
import time
from pipelines.finetune import stage as finetune
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.methods import METHODS
from pipelines.backbones.clip import BackboneConfig
from pipelines.finetune.loop import TrainingJob
from tests.small_clip import small_clip, toy_data

finetune.backbones.load = lambda *_: small_clip()
finetune.backbones.identity = lambda _: {"name": "small"}
jobs = [
    TrainingJob(METHODS["coop"].Config(training={"epochs": epochs, "warmup_epochs": 0}), seed)
    for seed, epochs in ((0, 3), (1, 3), (0, int(sys.argv[2])))
]
def told(job, report):
    print(jobs.index(job), int(report["epoch"]), flush=True)
    if (jobs.index(job), int(report["epoch"])) == (2, int(sys.argv[3])):
        time.sleep(600)

for address in finetune.train(
    jobs, toy_data(), BackboneConfig(name="small"), Storage(sys.argv[1]),
    compute=ComputeConfig(), mode="in_process",
    on_epoch=told,
):
    print("head", address, flush=True)
"""


def start(storage: Path, stop_at: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(storage), "60", str(stop_at)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.fault
@pytest.mark.slow
def test_finished_heads_are_found_again_and_the_one_in_work_goes_on(tmp_path: Path) -> None:
    first = start(tmp_path, stop_at=5)
    assert first.stdout is not None
    lines = []
    for line in first.stdout:
        lines.append(line.split())
        if lines[-1] == ["2", "5"]:  # two heads are done, the third is in work
            first.send_signal(signal.SIGKILL)
            break
    assert first.wait(timeout=PATIENCE) == -signal.SIGKILL, first.stderr and first.stderr.read()
    first.communicate()
    heads = tmp_path / "cache" / "heads"
    done = {p.parent.name: p.stat().st_mtime_ns for p in heads.glob("*/manifest.json")}
    assert len(done) == 2
    time.sleep(0.05)
    second = start(tmp_path)
    out, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, err
    again = [line.split() for line in out.splitlines()]
    epochs = [tuple(map(int, line)) for line in again if line[0] != "head"]
    assert {job for job, _ in epochs} == {2}
    # The epochs of the third head that were finished are not trained again.
    assert epochs[0][1] >= 5
    assert epochs[-1] == (2, 60)
    for head, written in done.items():
        assert (heads / head / "manifest.json").stat().st_mtime_ns == written
    assert {line[1] for line in again if line[0] == "head"} > set(done)
    storage = Storage(str(tmp_path))
    assert all(storage.exists("cache", "heads", line[1], "manifest.json") for line in again[-3:])
