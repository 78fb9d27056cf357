"""A run whose heads learn from augmented views: they are made once, found again, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.features import FeatureCache
from pipelines.data.storage import Storage
from tests.conftest import SmokeRun
from tests.ray.commands import job_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_heads_learn_from_views_of_the_training_images(smoke_run: SmokeRun, tmp_path: Path) -> None:
    root = smoke_run.copy_cache(tmp_path / "storage", "backbones", "features")
    words = ["preset=test", "methods=[coop]", "sweep=none", "training=in_process"]
    words += ["embed.views=3", f"storage={root}"]
    plain = json.loads(next(smoke_run.storage.glob("runs/*/embed.json")).read_text())
    done = job_here("pipeline", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = root.glob("runs/*")
    (source,) = json.loads((folder / "embed.json").read_text())["sources"].values()
    # The features of the images as they are were found, not made again under another address.
    assert source["address"] == plain["sources"]["digits"]["address"]
    images = FeatureCache(Storage.open(str(root)), source["address"])
    views = FeatureCache(Storage.open(str(root)), source["views"])
    assert views.manifest.rows == 4 * 6  # shots x classes: no other image is cropped
    key = views.keys()[0].as_py()
    of_image, of_views = images.load([key])[0], views.load([key])[0].reshape(3, -1)
    np.testing.assert_allclose(np.linalg.norm(of_views, axis=1), 1, rtol=1e-5)
    assert len({row.tobytes() for row in (of_image, *of_views)}) == 4

    made = sorted(root.glob("cache/features/*"))
    again = job_here("pipeline", *words, "seeds=2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert sorted(root.glob("cache/features/*")) == made
