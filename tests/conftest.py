"""Fixtures that several folders share: one Ray per session, a tiny backbone, some pictures.

`make test` uses two processes (pytest-xdist). All that needs the session's Ray runs in one of them,
so there is one Ray; any other file runs whole in the process that is free.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Before torch and Ray are imported, here and in what tests start: two OpenMP threads that wait
# for each other on a busy machine are far slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Else the other process's tests would have the CPU and Ray's workers what they leave.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from pipelines.data.storage import Storage
from pipelines.store.tracker import Tracker, open_tracker
from tests.ray.commands import ROOT, job

SHARED = Path(os.environ.get("ENERGY_OOD_SHARED", Path(__file__).parents[2] / "shared"))

VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
RESNET = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 64,
        "layers": [1, 1, 1, 1],
        "width": 8,
        "patch_size": None,
        "head_width": 16,
    },
    "text_cfg": VIT["text_cfg"],
}
ARCHITECTURES = {"vit": VIT, "resnet": RESNET}
# Fixtures that one process of a session makes, for all files that name them.
ONCE = ("ray_cluster", "smoke_run")


def pytest_configure(config: pytest.Config) -> None:
    # Ray copies its own settings, the deprecated ones among them.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:ray.data.context")


class OneRay(LoadScopeScheduling):
    """A file's tests run in one process, and those of all files that name the session's Ray."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "ray" if names_ray(ROOT / path) else path


@cache
def names_ray(file: Path) -> bool:
    texts = [p.read_text() for p in (file, file.with_name("conftest.py")) if p.exists()]
    return file.parent != ROOT / "tests" and any(name in t for t in texts for name in ONCE)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneRay:
    return OneRay(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data; only where it is absent altogether are its tests skipped."""
    if not SHARED.exists():
        pytest.skip(f"no reference data at {SHARED} (ENERGY_OOD_SHARED names another folder)")
    return SHARED


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """One local Ray for the whole session."""
    if worker_id != "master":
        (tmp_path_factory.getbasetemp().parent / "ray").mkdir()  # fails in a second process
    import ray

    from pipelines.compute.cluster import ComputeConfig, connect

    with connect(ComputeConfig(num_cpus=4)):
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="session")
def backbone_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Tiny ViT and ResNet backbones, seeded, as (JSON, safetensors) files by tower."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("backbones")
    files = {}
    for name, architecture in ARCHITECTURES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.CLIP(**json.loads(json.dumps(architecture)))
            for key, value in model.named_buffers():  # as if trained: no statistic is 0 or 1
                if key.endswith("running_mean"):
                    value.normal_(0, 0.1)
                elif key.endswith("running_var"):
                    value.uniform_(0.5, 1.5)
            for key, value in model.named_parameters():
                if key.endswith("bn3.weight"):
                    value.data.uniform_(0.5, 1.5)
        paths = folder / f"{name}.json", folder / f"{name}.safetensors"
        paths[0].write_text(json.dumps(architecture))
        save_file(model.state_dict(), paths[1])
        files[name] = paths
    return files


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 seeded JPEG files in three class folders, of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(30):
        path = folder / f"class_{number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        height, width = random.integers(24, 90, 2)
        coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height))).save(path, quality=90)
    return folder


@pytest.fixture(scope="session")
def mini_storage(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Storage:
    """A storage that holds the trained backbone `mini`; copy its cache/backbones, add nothing."""
    from pipelines.backbones import mini

    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # the processes of pytest-xdist train it once
        folder = folder.parent
    storage = Storage.open(str(folder / "mini"))
    with FileLock(folder / "mini.lock"):
        mini.ensure(storage)
    return storage


# What a user's environment holds while a job runs: no file and no line may tell it.
SECRET = "geheim-8c1d"
SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
)  # fmt: skip


@dataclass(frozen=True)
class SmokeRun:
    """What `python -m jobs.pipeline preset=test` left and printed, in a process of its own."""

    storage: Path
    done: subprocess.CompletedProcess[str]

    def copy_cache(self, storage: Path, *names: str) -> Path:
        """Give another storage these folders of this one's cache."""
        for name in names:
            shutil.copytree(self.storage / "cache" / name, storage / "cache" / name)
        return storage


@pytest.fixture(scope="session")
def smoke_run(mini_storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """One undisturbed run; copy its files, change nothing in them."""
    storage = tmp_path_factory.mktemp("smoke") / "storage"
    backbones = ("cache", "backbones")
    shutil.copytree(mini_storage.local(*backbones), storage.joinpath(*backbones))
    with pytest.MonkeyPatch.context() as environment:
        for name in SECRETS:
            environment.setenv(name, SECRET)
        done = job("pipeline", "preset=test", f"storage={storage}")
    assert done.returncode == 0, done.stdout + done.stderr
    return SmokeRun(storage, done)


@dataclass(frozen=True)
class Store:
    storage: Storage
    tracker: Tracker
    said: str  # what creating it put on the terminal


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One MLflow database for the session: creating it takes seconds."""
    storage = Storage.open(str(tmp_path_factory.mktemp("mlflow")))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        tracker = open_tracker(storage)
    return Store(storage, tracker, said.getvalue())
