"""Published networks: accuracy, and MSP and energy against other images, as known.

The known values are in the README of the reference data: accuracy on the test images, and
AUROC in percent, computed with other code (the images' crop before their resize).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from pipelines.backbones import network
from pipelines.backbones.classifier import ImageClassifier
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import FEATURE, Encoder, Preparer
from pipelines.config import load
from pipelines.data.sources import ParquetSource
from pipelines.data.storage import Storage
from pipelines.embed.own_images import FolderJob
from pipelines.ood import energy, msp

pytestmark = pytest.mark.slow  # 17,000 images through a network
# The images, accuracy in percent and how far one image moves it; then AUROC of MSP and energy
# against other images.
KNOWN = {
    "cifar10_resnet20": ("cifar10", 91.73, 0.011, {
        "cifar100": (86.22, 88.26), "tinyimagenet": (85.52, 89.23), "dtd10": (87.30, 89.39),
        "scenes": (86.12, 89.48),
    }),
    "cifar10_resnet56": ("cifar10", 93.39, 0.011, {
        "cifar100": (86.36, 87.43), "tinyimagenet": (86.49, 88.14), "dtd10": (86.07, 85.67),
        "scenes": (84.98, 85.70),
    }),
    "cifar10_densenet100": ("cifar10", 94.54, 0.011, {
        "cifar100": (88.57, 89.86), "tinyimagenet": (89.00, 91.98), "dtd10": (88.48, 87.73),
        "scenes": (88.71, 90.09),
    }),
    "imagenet_effnet_lite0": ("imagenet_small", 78.46, 0.14, {
        "dtd10": (76.95, 75.61), "scenes": (76.87, 71.82), "pacs_sketch": (73.11, 59.27),
    }),
}  # fmt: skip
CLASS_MAPS = {"imagenet_small": "imagenet_small_names.json#names"}


# Thirteen minutes on one core: the slow matrix does without it.
LONG = pytest.mark.skipif(
    "ENERGY_OOD_LONG" not in os.environ, reason="13 minutes; ENERGY_OOD_LONG=1 runs it"
)


@pytest.fixture(
    params=[pytest.param(n, marks=LONG) if "densenet" in n else n for n in KNOWN], ids=list(KNOWN)
)
def model(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> ImageClassifier:
    words = [f"backbone={request.param}", "source=unused"]
    path = shared / "models" / f"{request.param}.safetensors"
    config: BackboneConfig = load(
        FolderJob, "embed_folder", [*words, f"backbone.path={path}"]
    ).backbone
    loaded = network.load(network.resolve(config, Storage.open(str(tmp_path))))
    assert isinstance(loaded, ImageClassifier)
    return loaded


def logits(model: ImageClassifier, source: ParquetSource, keys: list[str]) -> NDArray[np.float64]:
    size = 250 if model.image_size[0] < 64 else 32
    batches = Preparer(model.crop).batches(keys, source.read(keys), size)
    features = Encoder(model, size).encode(batches).columns[FEATURE].astype(np.float64)
    return features @ model.weight.T.astype(np.float64) + model.bias


def test_accuracy_and_auroc_are_the_known_ones(model: ImageClassifier, shared: Path) -> None:
    known, accuracy, one_image, others = KNOWN[model.name]
    sides = {}
    for data in (known, *others):
        path = shared / "data" / f"{data}.parquet"
        source = ParquetSource(root=str(path), class_map=CLASS_MAPS.get(data))
        rows = [row for row in source.index().to_pylist() if row["split"] == "test"]
        sides[data] = logits(model, source, [row["key"] for row in rows])
        if data == known:
            right = [model.class_names[k] for k in sides[data].argmax(axis=1)]
            found = 100 * np.mean(
                [r == row["class_name"] for r, row in zip(right, rows, strict=True)]
            )
    assert found == pytest.approx(accuracy, abs=one_image)
    for data, wanted in others.items():
        both = torch.from_numpy(np.concatenate([sides[known], sides[data]]))
        is_id = np.arange(len(both)) < len(sides[known])
        for score, value in zip((msp, energy), wanted, strict=True):
            assert 100 * roc_auc_score(is_id, score(both)) == pytest.approx(value, abs=0.3), data
