"""Scores of images after an input step through the pipeline: searched around, kept, found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.backbones import network
from pipelines.config import load
from pipelines.data.digits import DigitsSource
from pipelines.data.images import decode
from pipelines.data.storage import Storage
from pipelines.finetune.cache import load_predictor
from pipelines.settings.config import PipelineConfig
from tests.conftest import SmokeRun
from tests.ray.commands import job_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
SCORES = ["mcm", "odin", "perturbed_mahalanobis"]
TAU, EPS = 50.0, 0.01


def test_a_run_makes_the_passes_once_and_odin_is_the_formula(
    smoke_run: SmokeRun, tmp_path: Path
) -> None:
    root = smoke_run.copy_cache(tmp_path / "storage", "backbones", "features")
    words = [
        "preset=test",
        "methods=[zero_shot,coop]",
        f"scores=[{','.join(SCORES)}]",
        f"methods.zero_shot.score_params.odin={{tau: {TAU}, eps: {EPS}}}",
        "training=in_process",
        f"storage={root}",
    ]
    features = {path.parent.name for path in root.glob("cache/features/*/manifest.json")}
    done = job_here("pipeline", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    passes = {p.parent.name for p in root.glob("cache/features/*/manifest.json")} - features
    # ODIN's rule is the head's, the Mahalanobis score's record is that of all heads.
    assert len(passes) == 3
    (folder,) = root.glob("runs/*")
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {(row["method"], row["score"]) for row in rows} == {
        (method, score) for method in ("zero_shot", "coop") for score in SCORES
    }
    params = {row["method"]: row["params"] for row in rows if row["score"] == "odin"}
    assert params == {"zero_shot": {"tau": TAU, "eps": EPS}, "coop": {"tau": 1000.0, "eps": 0.0014}}
    again = job_here("pipeline", *words)
    assert "found, nothing to do" in again.stdout + again.stderr

    # Four images by hand: the step from differences of the network's own logits.
    heads = json.loads((folder / "finetune.json").read_text())["heads"]
    scored = json.loads((folder / "score.json").read_text())["heads"]
    zero_shot = {"method": "zero_shot", "seed": 0, "variant": "chosen"}
    (address,) = [head["address"] for head in heads if head["key"] == zero_shot]
    (place,) = [head["address"] for head in scored if head["key"] == zero_shot]
    storage = Storage.open(str(root))
    head = load_predictor(storage, address)
    weight = torch.from_numpy(head.arrays["text_features"] * np.float32(head.logit_scale))
    config = load(PipelineConfig, "pipeline", words).backbone
    tower = network.load(network.resolve(config, storage))
    parts = [pq.read_table(p) for p in root.glob(f"cache/scores/{place}/*.parquet")]
    table = pa.concat_tables(parts)
    rows = table.filter(pc.starts_with(table["key"], "digits/")).slice(0, 4).to_pylist()
    for row, content in zip(rows, DigitsSource().read([r["key"] for r in rows]), strict=True):
        assert isinstance(content, bytes)
        image = torch.from_numpy(np.asarray(tower.crop(decode(content))).copy())[None]

        def probability(unit: torch.Tensor) -> torch.Tensor:
            logits = tower.features(tower.standardize(unit)) @ weight.T
            return torch.softmax(logits.double() / TAU, dim=1).amax(dim=1)

        unit = tower.to_unit(image).requires_grad_()
        (slope,) = torch.autograd.grad(probability(unit).log().sum(), unit)
        moved = unit.detach() + EPS * slope.sign()
        assert row["score_odin"] == pytest.approx(probability(moved).item(), rel=1e-4)
