"""SIGTERM and Ctrl-C in the middle of a stage: one line, 143 or 130, and nobody left behind.

A job is held where one of its processes writes a file of the stage (`tests.barrier`), in a worker
of Ray for most stages. Ctrl-C goes to the whole process group, as a terminal sends it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.barrier import Barrier, gone, wait_until
from tests.conftest import SmokeRun
from tests.patience import PATIENCE
from tests.ray.commands import end, job_here, ray_folder, start
from tests.ray.processes import descendants

pytestmark = pytest.mark.usefixtures("ray_cluster")
# The first file that a stage writes of each kind that is its work, not its record.
HELD = {
    "embed": "cache/features/*/0*.parquet",
    "sweep": "cache/trials/*.json",
    "finetune": "cache/heads/*/checkpoint.pt",
    "score": "cache/scores/*/*.parquet",
    "evaluate": "runs/*/report.html",
    "register": "runs/*/register.json",
}
STAGES = list(HELD)
SLOW_START = "Ray did not start within 30 s; once more"
WORDS = ("methods=[coop]", "scores=[mcm]", "preset=test")
# Without a search, finetune is the first stage that trains.
SHORT = ("sweep=none", "training=ray", *WORDS)


def done_before(storage: Path, stage: str, *words: str) -> None:
    """Finish, in this process, the stages before one that are not done."""
    for name in STAGES[: STAGES.index(stage)]:
        if not list(storage.glob(f"runs/*/stamps/{name}.json")):
            done = job_here(name, f"storage={storage}", *words)
            assert done.returncode == 0, done.stdout + done.stderr


def stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # started in a session, so a group, of its own
    else:
        process.send_signal(number)


def stopped_in(stage: str, number: signal.Signals, storage: Path, *words: str) -> None:
    """Stop `jobs.STAGE` in its work, and look at how it ends."""
    barrier = Barrier.new(storage.parent / f"barrier-{stage}-{number}", held=HELD[stage])
    held = json.dumps(asdict(barrier))
    with ray_folder() as folder:
        process = start(
            "tests.ray.held_job", held, stage, f"storage={storage}", *words, folder=folder
        )
        try:
            barrier.arrived(lambda: process.poll() is None)
            below = descendants(process.pid)
            stop(process, number)
            _, err = process.communicate(timeout=PATIENCE)
            wait_until(lambda: all(gone(pid) for pid in below), PATIENCE)
        finally:
            barrier.open()
            end(process)
    assert process.returncode == 128 + number, err
    said = [line for line in err.splitlines() if line != SLOW_START]  # beside other work
    assert said == ["stopped; the same command goes on from here"], err
    assert not list(storage.glob(f"runs/*/stamps/{stage}.json")), "was done before it was stopped"


def test_ray_train_that_is_stopped_says_how_to_go_on(smoke_run: SmokeRun, tmp_path: Path) -> None:
    storage = smoke_run.copy_cache(tmp_path / "storage", "backbones", "features")
    done_before(storage, "finetune", *SHORT)
    stopped_in("finetune", signal.SIGINT, storage, *SHORT)


@pytest.fixture(scope="module")
def long_storage(smoke_run: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stages are done one after the other, as far as a test needs them."""
    return smoke_run.copy_cache(tmp_path_factory.mktemp("stopped") / "storage", "backbones")


# The signals in turn: the one that is sent in `make test` is the other of its stage.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"),
    [(s, (signal.SIGTERM, signal.SIGINT)[n % 2]) for n, s in enumerate(STAGES)],
)
def test_every_stage_is_stopped(stage: str, number: signal.Signals, long_storage: Path) -> None:
    done_before(long_storage, stage, *WORDS)
    stopped_in(stage, number, long_storage, *WORDS)
