"""The embedded backbone: learned from what it may see, loaded like every other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pipelines.backbones import mini, network
from pipelines.backbones.clip import Clip
from pipelines.backbones.description import BackboneConfig
from pipelines.config import CONF, UserError
from pipelines.data.digits import NAMES, DigitsSource
from pipelines.data.images import decode
from pipelines.data.storage import Storage

SPLIT = json.loads((CONF / "benchmark" / "digits_split.json").read_text())
TARGET = load_digits().target


def loaded(storage: Storage) -> Clip:
    resolved = network.resolve(BackboneConfig(name="mini", kind="mini"), storage)
    return network.load(resolved)


def accuracy(model: Clip, style: str) -> float:
    """Zero-shot accuracy on the test part of the digits 0 to 5, by one template."""
    indices = [i for i in SPLIT["test"] if TARGET[i] < 6]
    contents = DigitsSource().read([f"digits/{i:04d}/{style}" for i in indices])
    pixels = torch.stack([model.preprocess(decode(bytes(c))) for c in contents])
    texts = model.encode_text([f"a photo of the digit {name}." for name in NAMES[:6]])
    predicted = (model.encode_image(pixels) @ texts.T).argmax(dim=1).numpy()
    return float(np.mean(predicted == TARGET[indices]))


def test_it_knows_the_id_classes(mini_storage: Storage) -> None:
    model = loaded(mini_storage)
    assert accuracy(model, "plain") >= 0.90
    # Styles it has seen carry over; the others are worse and leave room for a shift.
    assert accuracy(model, "inverted") >= 0.80
    assert accuracy(model, "rotated") < accuracy(model, "plain")


def test_it_is_found_again_without_training(
    mini_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(mini, "train", refuse)
    architecture, weights = mini.ensure(mini_storage)
    assert json.loads(architecture.read_text()) == mini.ARCHITECTURE
    assert weights.suffix == ".safetensors"


def test_it_learns_from_training_images_of_the_digits_0_to_7_in_three_styles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = DigitsSource.read

    def spy(self: DigitsSource, keys: list[str]) -> list[bytes | Exception]:
        seen.extend(keys)
        return read(self, keys)

    monkeypatch.setattr(DigitsSource, "fingerprint", lambda _: "reads nothing")
    monkeypatch.setattr(DigitsSource, "read", spy)
    monkeypatch.setattr(mini, "STEPS", 2)
    mini.ensure(Storage.open(str(tmp_path)))
    known = {i for i in SPLIT["train"] if TARGET[i] < 8}
    assert set(seen) == {
        f"digits/{i:04d}/{style}" for i in known for style in ("plain", "inverted", "noisy")
    }


def test_the_callers_random_state_and_threads_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "STEPS", 1)
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    mini.ensure(Storage.open(str(tmp_path)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_storage_behind_a_uri_is_refused() -> None:
    with pytest.raises(UserError, match=r"storage=memory://.*folder of this machine"):
        mini.ensure(Storage.open("memory://mini"))


@pytest.mark.slow
def test_the_same_bytes_twice(mini_storage: Storage, tmp_path: Path) -> None:
    (_, first), (_, second) = mini.ensure(mini_storage), mini.ensure(Storage.open(str(tmp_path)))
    assert first != second
    assert first.read_bytes() == second.read_bytes()
