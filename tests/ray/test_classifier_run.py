"""An image classifier through the whole pipeline, and its registered model in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipelines.backbones.kinds import cifar
from pipelines.data.digits import DigitsSource
from pipelines.data.storage import Storage
from pipelines.ood import FITTED_SCORES
from pipelines.predict.stage import load_detector
from tests.ray.commands import job, job_here

pytestmark = pytest.mark.usefixtures("ray_cluster")
# The benchmark's classes in another order, and one that it has not.
NAMES = ["nine", "five", "four", "three", "two", "one", "zero"]
OF_LOGITS = {"msp", "max_logit", "energy", "neg_entropy", "gen"}


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """The word of a network of seeded weights: its numbers mean nothing."""
    torch.manual_seed(0)
    network = cifar.NETWORKS["resnet20"](len(NAMES))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    about = {
        "name": "seeded",
        "kind": "cifar",
        "model": "resnet20",
        "path": str(tmp_path / "weights.safetensors"),
        "class_names": NAMES,
        "preprocessing": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
        "layers": {"layer1": 16, "layer3": 64},
    }
    (tmp_path / "seeded.yaml").write_text(json.dumps(about))
    return f"backbone=@{tmp_path}/seeded.yaml"


def test_what_a_classifier_cannot_do_is_said_before_any_work(backbone: str, tmp_path: Path) -> None:
    storage = f"storage={tmp_path}/storage"
    asked = (
        (("methods=[coop]", "scores=[mcm]"), "methods.coop: head=coop needs a vision-language"),
        (("methods=[classifier]", "scores=[mcm]"), "scores: mcm applies to no method of this run"),
        (
            ("methods=[classifier]", "scores=[energy+ssd]", "benchmark.every_class=false"),
            "scores: energy+ssd is fitted to the training images of every class, and benchmark",
        ),
        (("methods=[classifier]", "scores=[msp]", "backbone=mini"), "needs an image classifier"),
        (
            ("methods=[classifier]", "scores=[msp]", "backbone.class_names=[a,b,c,d,e,f,two]"),
            "its classifier has no class 'zero', 'one', 'three' (5 unknown); it has 7: a, b",
        ),
    )
    for words, message in asked:
        done = job_here("pipeline", backbone, storage, "sweep=none", *words)
        assert done.returncode == 2, done.stdout
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_from_images_to_a_registered_model(backbone: str, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    words = (backbone, "methods=[classifier]", "scores=all", "sweep=none", "seeds=1", "shots=null")
    few = ("evaluate.num_resamples=100", f"storage={storage}")
    done = job_here("pipeline", *words, *few, "register_as.score=odin")
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = storage.glob("runs/*/metrics.json")
    rows = json.loads(metrics.read_text())["rows"]
    assert {row["score"] for row in rows} == OF_LOGITS | set(FITTED_SCORES)
    image = tmp_path / "image.png"
    (content,) = DigitsSource().read(["digits/0000/plain"])
    assert isinstance(content, bytes)
    image.write_bytes(content)
    judged = job("predict", f"source={image}", f"storage={storage}")
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert any(name in judged.stdout for name in NAMES)
    (head,) = json.loads((metrics.parent / "score.json").read_text())["heads"]
    parts = [pq.read_table(p) for p in storage.glob(f"cache/scores/{head['address']}/*.parquet")]
    (row,) = pa.concat_tables(parts).slice(0, 1).to_pylist()
    (content,) = DigitsSource().read([row["key"]])
    assert isinstance(content, bytes)
    # A registered model makes its score's own pass over the pixels, and gives the table's score.
    for score in ("odin", "layer_mahalanobis"):
        if score != "odin":
            done = job_here("pipeline", *words, *few, f"register_as.score={score}")
            assert done.returncode == 0, done.stdout + done.stderr
        detector = load_detector("models:/energy-ood@champion", Storage.open(str(storage)))
        assert detector.score == score
        (verdict,) = detector.judge_images([content]).to_pylist()
        # Batches of other sizes: the last bit of a feature, so the sign of a slope near zero.
        assert verdict["score"] == pytest.approx(row[f"score_{score}"], rel=1e-4)
    # Images as they are, after two steps, and their layers; the layers of the training images.
    assert len(list(storage.glob("cache/features/*/manifest.json"))) == 5
