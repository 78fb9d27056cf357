"""Code that changed between a kill and the restart: no table holds rows of two versions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.barrier import Barrier
from tests.layers.copies import ROOT, copy_tree
from tests.patience import PATIENCE
from tests.ray.commands import environment, ray_folder
from tests.ray.processes import descendants, kill
from tests.store.conftest import WORDS

PARTS = "cache/scores/*/*.parquet"


def job_in(tree: Path, module: str, *words: str, barrier: Barrier | None = None) -> None:
    """A job of the code in `tree`, to its end, or until it is held and then killed."""
    with ray_folder() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=tree,
            env=environment(folder, PYTHONPATH=os.pathsep.join((str(tree), str(ROOT)))),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            if barrier is None:
                _, error = process.communicate(timeout=PATIENCE)
                assert process.returncode == 0, error
            else:
                barrier.arrived(lambda: process.poll() is None)
        finally:
            below = descendants(process.pid)
            process.kill()
            process.communicate()
            for pid in below:
                kill(pid)


@pytest.mark.slow
def test_parts_of_two_versions_never_meet(finished: Path, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    shutil.rmtree(tree / "tests")  # the held job's come from the checkout
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for storage in (killed, undisturbed):
        for name in ("backbones", "features"):
            shutil.copytree(finished / "cache" / name, storage / "cache" / name)
    barrier = Barrier.new(tmp_path / "barrier", held=PARTS, after=PARTS)
    words = [*WORDS, f"storage={killed}"]
    held = json.dumps(asdict(barrier))
    job_in(tree, "tests.ray.held_job", held, "pipeline", *words, barrier=barrier)
    # Of the old code; a task beside the held one may have written its part too.
    assert 0 < len(list(killed.glob(PARTS))) < len(list(finished.glob(PARTS)))
    file = tree / "pipelines" / "ood" / "scores.py"
    text = file.read_text()
    old = "lambda block: max_softmax(block, tau),\n        similarity="
    assert text.count(old) == 1
    file.write_text(text.replace(old, old.replace("block, tau)", "block, tau) * -1")))
    for storage in (killed, undisturbed):
        job_in(tree, "jobs.pipeline", *WORDS, f"storage={storage}")
    tables = [next(s.glob("runs/*/metrics.json")).read_bytes() for s in (killed, undisturbed)]
    assert tables[0] == tables[1]
    before = json.loads(next(finished.glob("runs/*/metrics.json")).read_bytes())
    assert json.loads(tables[0])["rows"] != before["rows"]
