"""Processes of the tests: python -m tests.store.held WHAT STORAGE FOLDER NAME more...

Each says in FOLDER/NAME that it is ready, and goes on when FOLDER/go is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.backbones.description import BackboneConfig
from pipelines.data.storage import Storage
from pipelines.evaluate.metrics import Threshold
from pipelines.heads import Predictor
from pipelines.register import stage
from pipelines.register.stage import Candidate, register
from pipelines.store.leases import at_work
from pipelines.store.processes import temporary_folder
from pipelines.store.tracker import load_mlflow, open_tracker
from tests.barrier import wait_until

NAMES = ("zero", "one dog", "two cats", "three", "four")


def candidate(config: str, weights: str) -> Candidate:
    """A small detector; the files are those of a backbone."""
    x = np.random.default_rng(9).normal(size=(5, 16))
    rows = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return Candidate(
        predictor=Predictor("zero_shot", {"text_features": rows}, {}, 11.5, NAMES),
        backbone=BackboneConfig(name="small", config=config, path=weights),
        method="ebm",
        score="delta_energy",
        params={"tau": 0.07, "c": 2},
        threshold=Threshold(value=1.25, low=1.0, high=1.5, num_images=400),
        target_tpr=0.95,
        class_names=NAMES,
    )


def ready(folder: str, name: str) -> None:
    """Say so, and wait."""
    Path(folder, name).write_text("ready\n")
    wait_until(Path(folder, "go").exists)


def opens(storage: Storage, folder: str, name: str, *_: str) -> None:
    """Open the store of a storage, which may be new."""
    load_mlflow()
    ready(folder, name)
    with open_tracker(storage).run(name) as run:
        print(run.run_id)


def registers(storage: Storage, folder: str, name: str, *files: str) -> None:
    """Register what others register too."""
    wanted, tracker = candidate(*files), open_tracker(storage)
    with tracker.run(name) as run:
        ready(folder, name)
        print(register(wanted, tracker, run.run_id).model_version)


def works(storage: Storage, folder: str, name: str, *files: str) -> None:
    """Be in the middle of everything that is left behind when a process is killed."""

    go_on = stage._ensure_name

    def hold(*given: Any) -> None:
        ready(folder, name)
        go_on(*given)

    with at_work(storage), temporary_folder() as temporary:
        (temporary / name).touch()
        storage.write_bytes(b"", "cache", "ray_train", f"train-{name}", "snapshot.json")
        tracker = open_tracker(storage)
        with tracker.run(name) as run, storage.writing("cache", "heads", f"{name}.json") as path:
            path.write_text("half a rec")
            stage._ensure_name = hold  # the model is logged by then, and has no version
            wanted = candidate(*files)
            # Without the lock of `register`: two are to be in the middle of it.
            stage._create(wanted, tracker, run.run_id, "energy-ood", wanted.content())


if __name__ == "__main__":
    what, root, *more = sys.argv[1:]
    {"opens": opens, "registers": registers, "works": works}[what](Storage.open(root), *more)
