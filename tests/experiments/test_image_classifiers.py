"""The figures of image classifiers, on a few made-up images and a small network."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipelines.backbones import network
from pipelines.backbones.classifier import ImageClassifier
from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.backbones.kinds import cifar
from pipelines.data.storage import Storage
from pipelines.experiments import image_classifiers

NAMES = ("cat", "dog", "horse")


@pytest.fixture
def model(tmp_path: Path) -> ImageClassifier:
    torch.manual_seed(0)
    state = cifar.NETWORKS["resnet20"](3).state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    config = BackboneConfig(
        name="small",
        kind="cifar",
        model="resnet20",
        path=str(tmp_path / "w.safetensors"),
        class_names=list(NAMES),
        preprocessing=Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3)),
    )
    loaded = network.load(network.resolve(config, Storage.open(str(tmp_path / "storage"))))
    assert isinstance(loaded, ImageClassifier)
    return loaded


def write_set(path: Path, seed: int, number: int = 12) -> None:
    random, images = np.random.default_rng(seed), []
    for _ in range(number):
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    columns = {
        "key": [f"{path.stem}/{n}" for n in range(number)],
        "image": images,
        "class_name": [NAMES[n % 3] for n in range(number)],
        "split": ["test"] * (number - 2) + ["train"] * 2,
    }
    pq.write_table(pa.table(columns), path)


def test_the_tables_count_what_the_network_says(
    model: ImageClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("cifar10", *image_classifiers.OTHERS.values())):
        write_set(tmp_path / "data" / f"{name}.parquet", seed)
    monkeypatch.setenv("ENERGY_OOD_SHARED", str(tmp_path))
    monkeypatch.setattr(image_classifiers, "_model", lambda: model)
    summary = image_classifiers.run(tmp_path)
    # The accuracy of the table, from the pixels by the network itself.
    rows = pq.read_table(tmp_path / "data" / "cifar10.parquet").to_pylist()[:10]
    right = 0
    for row in rows:
        image = np.asarray(Image.open(io.BytesIO(row["image"])))
        pixels = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.3
        logits = model.network(pixels)[0].numpy() @ model.weight.T + model.bias
        right += NAMES[int(logits.argmax())] == row["class_name"]
    assert f"| lossless | {100 * right / 10:.3g} |" in summary
    assert summary.count("| JPEG, quality") == len(image_classifiers.QUALITIES)
    with (tmp_path / "image_classifiers.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 4 * 2 * len(image_classifiers.TEMPERATURES)
    assert all(0 <= float(row["fpr95"]) <= 1 for row in curves)
    assert (tmp_path / "image_classifiers.png").stat().st_size > 10_000
