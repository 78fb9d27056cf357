"""mini-rn-64 on PACS: the project's features against open_clip's own, and the known values."""

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer
from pipelines.data.sources import ParquetSource
from pipelines.data.storage import Storage
from pipelines.embed.text import text_features

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.fixture(scope="module")
def backbone(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> BackboneConfig:
    files = shared / "models" / "mini-rn-64.json", shared / "models" / "mini-rn-64.safetensors"
    config = BackboneConfig(name="mini_rn_64", config=str(files[0]), path=str(files[1]))
    return network.resolve(config, Storage.open(str(tmp_path_factory.mktemp("storage"))))


def encode(backbone: BackboneConfig, contents: list[bytes | Exception]) -> tuple[np.ndarray, list]:
    loaded = network.load(backbone)
    keys = [str(number) for number in range(len(contents))]
    batches = Preparer(loaded.crop).batches(keys, contents, 64)
    encoded = Encoder(loaded, 64).encode(batches)
    return encoded.columns["feature"], encoded.verdicts


def test_features_equal_open_clips_encode_image(backbone: BackboneConfig, shared: Path) -> None:
    source = ParquetSource(root=str(shared / "data" / "pacs_photo.parquet"))
    contents = source.read(source.index()["key"].to_pylist()[:100])
    features, verdicts = encode(backbone, contents)
    model = open_clip.CLIP(**json.loads(Path(str(backbone.config)).read_text()))
    model.load_state_dict(load_file(str(backbone.path)))
    transform = open_clip.image_transform(64, is_train=False)
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(c))) for c in contents])
        expected = model.eval().encode_image(pixels, normalize=True).numpy()
    assert verdicts == [None] * 100
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)


def test_zero_shot_accuracy_on_pacs_photo_is_the_known_value(
    backbone: BackboneConfig, shared: Path, tmp_path: Path
) -> None:
    source = ParquetSource(root=str(shared / "data" / "pacs_photo.parquet"))
    rows = [row for row in source.index().to_pylist() if row["split"] == "test"]
    features, _ = encode(backbone, source.read([row["key"] for row in rows]))
    storage = Storage.open(str(tmp_path))
    texts = text_features(CLASSES, ["a photo of a {}."], backbone, storage)
    predicted = [CLASSES[k] for k in (features @ texts.T).argmax(axis=1)]
    correct = sum(p == row["class_name"] for p, row in zip(predicted, rows, strict=True))
    assert len(rows) == 304
    assert abs(correct - 0.681 * 304) <= 1
