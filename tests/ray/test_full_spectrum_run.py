"""A run whose threshold, p-values and champion know shifted validation images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.data.storage import Storage
from pipelines.predict.stage import load_detector
from tests.conftest import SmokeRun
from tests.ray.commands import job_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
NOISY = "{source: digits, classes: id, domains: [noisy], splits: [validation]}"


def test_shifted_validation_enters_threshold_p_values_and_choice(
    smoke_run: SmokeRun, tmp_path: Path
) -> None:
    root = smoke_run.copy_cache(tmp_path / "storage", "backbones")
    done = job_here(
        "pipeline",
        "preset=test",
        "methods=[zero_shot,coop]",
        "training=in_process",
        f"storage={root}",
        f"benchmark.sets.validation_shifted/noisy={NOISY}",
        "threshold.known=full_spectrum",
        "register_as.criterion=full_spectrum",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ID and shifted validation images" in done.stdout
    (folder,) = root.glob("runs/*")
    registered = json.loads((folder / "register.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    sizes = metrics["facts"]["sets"]
    assert registered["threshold"]["known"] == "full_spectrum"
    count = sizes["validation"] + sizes["validation_shifted/noisy"]
    assert registered["threshold"]["num_images"] == count > sizes["validation"]
    chosen = (registered["method"], registered["score"])
    (row,) = (r for r in metrics["rows"] if (r["method"], r["score"]) == chosen)
    assert row["threshold"] == registered["threshold"]
    detector = load_detector(registered["uri"], Storage.open(str(root)))
    assert len(detector.known_scores) == count
    share = (detector.known_scores >= detector.threshold).mean()
    assert share == pytest.approx(0.95, abs=1 / count)
