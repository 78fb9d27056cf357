"""`methods=[energy_correction]` through the main job: judged, reported, registered, used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest

from pipelines.data.digits import DigitsSource
from pipelines.data.storage import Storage
from tests.ray.commands import job_here

SCORES = ("mcm", "knn", "ssd", "mahalanobis", "vim", "energy_correction", "energy+knn")
TINY = (
    "methods.energy_correction.width=16",
    "methods.energy_correction.epochs=2",
    "methods.energy_correction.steps=4",
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, mini_storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    storage = tmp_path_factory.mktemp("energy") / "storage"
    shutil.copytree(mini_storage.local("cache", "backbones"), storage / "cache" / "backbones")
    done = job_here(
        "pipeline",
        "methods=[energy_correction]",
        f"scores=[{','.join(SCORES)}]",
        *TINY,
        # Ray Train and Tune have tests of their own; here each would only cost its start-up.
        "sweep=none",
        "training=in_process",
        "shots=8",
        "seeds=2",
        "evaluate.num_resamples=100",
        "register_as.score=energy_correction",
        f"storage={storage}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return storage


def test_every_score_is_in_the_tables_and_every_epoch_in_mlflow_and_the_report(
    finished: Path,
) -> None:
    (folder,) = (finished / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["score"] for row in metrics["rows"]] == list(SCORES)
    assert all(0 <= row["auroc"]["mean"]["mean"] <= 1 for row in metrics["rows"])
    models = metrics["energy_models"]
    assert [(m["score"], m["seed"], len(m["history"])) for m in models] == [
        ("energy_correction", 0, 2),
        ("energy_correction", 1, 2),
    ]
    page = (folder / "report.html").read_text()
    assert 'id="energy-models"' in page
    client = mlflow.MlflowClient(f"sqlite:///{finished}/mlflow.db")
    experiment = client.get_experiment_by_name("energy-ood")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (fitted,) = [r for r in runs if r.info.run_name == "fit energy_correction seed 1"]
    for name in ("energy/real", "energy/sampled", "drift", "norm/sampled", "coverage"):
        history = client.get_metric_history(fitted.info.run_id, name)
        assert [point.step for point in history] == [1, 2]
        assert history[-1].value == pytest.approx(models[1]["history"][-1][name])
    (main,) = [r for r in runs if "energy_correction/energy_knn/auroc/mean" in r.data.metrics]
    assert main.data.metrics["energy_correction/knn/auroc/mean"] > 0


def test_the_registered_model_carries_its_density(finished: Path, tmp_path: Path) -> None:
    (folder,) = (finished / "runs").iterdir()
    registered = json.loads((folder / "register.json").read_text())
    assert registered["score"] == "energy_correction"
    (image,) = DigitsSource().read(["digits/0003/plain"])
    assert isinstance(image, bytes)
    (tmp_path / "digit.png").write_bytes(image)
    done = job_here("predict", f"source={tmp_path}/digit.png", f"storage={finished}")
    assert done.returncode == 0, done.stderr
    assert f"threshold {registered['threshold']['value']:.6g}" in done.stdout
