"""Trained networks through the whole pipeline, beside the one that they start from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipelines.backbones.kinds import cifar
from pipelines.data.digits import DigitsSource
from tests.ray.commands import job, job_here
from tests.small_network import NAMES, short, write_network

pytestmark = pytest.mark.usefixtures("ray_cluster")
METHODS = ("classifier", "network_energy", "network_outlier_exposure")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A run of a network of seeded weights, and of two trained from it, two seeds each."""
    return [
        write_network(tmp_path), f"methods=[{','.join(METHODS)}]", *short(*METHODS[1:]),
        "scores=[msp,energy,knn]", "sweep=none", "seeds=2", "shots=4",
        "evaluate.num_resamples=100", f"storage={tmp_path}/storage",
    ]  # fmt: skip


@pytest.mark.slow
def test_networks_are_rows_beside_the_one_they_start_from(words: list[str], tmp_path: Path) -> None:
    done = job_here("pipeline", *words, "register_as.method=network_energy")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "storage" / "runs").iterdir()
    networks = json.loads((run / "train.json").read_text())["networks"]
    assert [(n["key"]["method"], n["key"]["seed"]) for n in networks] == [
        (name, seed) for name in METHODS[1:] for seed in (0, 1)
    ]
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert {row["method"] for row in rows} == set(METHODS)

    # A plain network with the kept weights gives the table's energies.
    place = tmp_path / "storage" / "cache" / "networks" / networks[1]["address"]
    plain = cifar.NETWORKS["resnet20"](len(NAMES))
    plain.load_state_dict(safetensors.torch.load_file(place / "weights.safetensors"))
    heads = json.loads((run / "score.json").read_text())["heads"]
    (head,) = (h for h in heads if h["key"] == networks[1]["key"])
    parts = (tmp_path / "storage" / "cache" / "scores" / head["address"]).glob("*.parquet")
    table = pa.concat_tables(pq.read_table(part) for part in parts).to_pylist()
    some = [row for row in table if row["set"] == "test"][:5]
    contents = DigitsSource().read([row["key"] for row in some])
    pixels = [
        np.asarray(
            Image.open(io.BytesIO(c)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        )
        for c in contents
        if isinstance(c, bytes)
    ]
    ready = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        energies = plain.eval()(ready).double().logsumexp(dim=1)
    assert [row["score_energy"] for row in some] == pytest.approx(energies.tolist(), rel=1e-4)

    # Nothing is done twice, and the registered network judges an image in a fresh process.
    again = job_here("pipeline", *words, "register_as.method=network_energy")
    assert again.stdout.count("found, nothing to do") == 7, again.stdout
    (tmp_path / "image.png").write_bytes(contents[0])
    judged = job("predict", f"source={tmp_path}/image.png", f"storage={tmp_path}/storage")
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert any(name in judged.stdout for name in NAMES)


def test_what_does_not_go_together_is_said_before_any_work(words: list[str]) -> None:
    asked = (
        (("backbone.untrained=true",), "methods.classifier: backbone 'seeded' has no weights"),
        (
            ("sweep=posthoc", "sweep.space.network_energy.wait=[0.1,1.0]"),
            "sweep.space.network_energy: no key 'wait'",
        ),
        (("sweep=posthoc", "sweep.space.network_enrgy.weight=[0.1]"), "network_enrgy: no such"),
        (
            ("sweep=posthoc", "sweep.space.network_energy={head.train.start: [random]}"),
            "head.train.start of a method that trains a whole network is not searched",
        ),
        (
            ("sweep=posthoc", "sweep.space.network_energy.weight=[0.1]", "scores=[knn]"),
            "scores=[knn] holds none; add energy",
        ),
        (("methods=[coop]", "methods.coop.head={name: classifier, train: {}}"), "trains no"),
        (("methods=[oecc]", "methods.oecc.head={name: linear_probe}"), "trains a whole network"),
    )
    for more, message in asked:
        given = {word.partition("=")[0] for word in more}
        kept = [w for w in words if w.partition("=")[0] not in given]
        kept = [w for w in kept if not w.startswith("methods") or "methods" not in given]
        done = job_here("pipeline", *kept, *more)
        assert done.returncode == 2, done.stdout
        assert message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
