"""Published networks on CIFAR-10: accuracy, and MSP and energy against other images, as known.

The known values are in the README of the reference data: accuracy on the 10,000 test images, AUROC
and FPR at 95 % TPR in percent, computed with other code (the images' crop before their resize).
"""

from __future__ import annotations

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
# Accuracy; then MSP and energy AUROC against CIFAR-100, Tiny ImageNet, textures and scenes.
KNOWN = {
    "resnet20": (91.73, (86.22, 88.26), (85.52, 89.23), (87.30, 89.39), (86.12, 89.48)),
    "resnet56": (93.39, (86.36, 87.43), (86.49, 88.14), (86.07, 85.67), (84.98, 85.70)),
    "densenet100": (94.54, (88.57, 89.86), (89.00, 91.98), (88.48, 87.73), (88.71, 90.09)),
}
OTHERS = ("cifar100", "tinyimagenet", "dtd10", "scenes")


@pytest.fixture(params=KNOWN)
def model(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> ImageClassifier:
    words = [f"backbone=cifar10_{request.param}", "source=unused"]
    path = shared / "models" / f"cifar10_{request.param}.safetensors"
    config: BackboneConfig = load(
        FolderJob, "embed_folder", [*words, f"backbone.path={path}"]
    ).backbone
    loaded = network.load(network.resolve(config, Storage.open(str(tmp_path))))
    assert isinstance(loaded, ImageClassifier)
    return loaded


def logits(model: ImageClassifier, source: ParquetSource, keys: list[str]) -> NDArray[np.float64]:
    batches = Preparer(model.crop).batches(keys, source.read(keys), 250)
    features = Encoder(model, 250).encode(batches).columns[FEATURE].astype(np.float64)
    return features @ model.weight.T.astype(np.float64) + model.bias


def test_accuracy_and_auroc_are_the_known_ones(model: ImageClassifier, shared: Path) -> None:
    name = model.name.removeprefix("cifar10_")
    accuracy, *known = KNOWN[name]
    sides = {}
    for data in ("cifar10", *OTHERS):
        source = ParquetSource(root=str(shared / "data" / f"{data}.parquet"))
        rows = [row for row in source.index().to_pylist() if row["split"] == "test"]
        sides[data] = logits(model, source, [row["key"] for row in rows])
        if data == "cifar10":
            right = [model.class_names[k] for k in sides[data].argmax(axis=1)]
            found = 100 * np.mean(
                [r == row["class_name"] for r, row in zip(right, rows, strict=True)]
            )
    assert found == pytest.approx(accuracy, abs=0.011)  # one image of 10,000
    for data, wanted in zip(OTHERS, known, strict=True):
        both = torch.from_numpy(np.concatenate([sides["cifar10"], sides[data]]))
        is_id = np.arange(len(both)) < len(sides["cifar10"])
        for score, value in zip((msp, energy), wanted, strict=True):
            assert 100 * roc_auc_score(is_id, score(both)) == pytest.approx(value, abs=0.3), data
