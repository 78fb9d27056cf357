"""Networks before training, and what is kept of them after it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision import models

from pipelines.backbones import network
from pipelines.backbones.classifier import ImageClassifier
from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.backbones.kinds import cifar
from pipelines.config import UserError
from pipelines.data.storage import Storage

NAMES = ["cat", "dog", "horse", "ship", "truck"]
HOW = Preprocessing(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def architecture(kind: str, num_classes: int = 5) -> tuple[str, nn.Module]:
    if kind == "timm":
        return "resnet10t", timm.create_model("resnet10t", num_classes=num_classes)
    if kind == "torchvision":
        return "resnet18", models.resnet18(num_classes=num_classes)
    return "resnet20", cifar.NETWORKS["resnet20"](num_classes)


def configured(kind: str, place: Path, **settings: object) -> tuple[BackboneConfig, nn.Module]:
    """A backbone with seeded weights in a file, and the architecture with the same weights."""
    torch.manual_seed(1)
    model, built = architecture(kind)
    built.train()(torch.randn(8, 3, 32, 32))  # statistics that are not those of a fresh network
    safetensors.torch.save_file(built.state_dict(), place / "w.safetensors")
    config = BackboneConfig(
        name="small", kind=kind, model=model, path=str(place / "w.safetensors"),
        class_names=NAMES, preprocessing=HOW, **settings,
    )  # fmt: skip
    return network.resolve(config, Storage.open(str(place))), built.eval()


def pixels(count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(HOW.mean), torch.tensor(HOW.std)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["cifar", "timm", "torchvision"])
def test_from_the_backbone_it_gives_the_logits_of_the_library(kind: str, tmp_path: Path) -> None:
    config, built = configured(kind, tmp_path)
    started = network.trainable(config, NAMES, "backbone", 0).eval()
    with torch.no_grad():
        _, logits = started(pixels())
        expected = built(normalised(pixels()))
    assert logits.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["cifar", "timm", "torchvision"])
def test_what_is_kept_is_loaded_by_torch_alone(kind: str, tmp_path: Path) -> None:
    config, _ = configured(kind, tmp_path)
    started = network.trainable(config, ["ship", "cat"], "backbone", 0)
    started(pixels(16))  # statistics move
    file = io.BytesIO()
    torch.save(started.state(), file)
    file.seek(0)
    _, plain = architecture(kind, num_classes=2)
    plain.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        _, logits = started.eval()(pixels())
        expected = plain.eval()(normalised(pixels()))
    assert logits.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


def test_chosen_classes_are_rows_of_the_last_layer(tmp_path: Path) -> None:
    config, built = configured("cifar", tmp_path)
    started = network.trainable(config, ["ship", "cat"], "backbone", 0).eval()
    with torch.no_grad():
        _, logits = started(pixels())
        expected = built(normalised(pixels()))[:, [3, 0]]
    assert logits.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
    with pytest.raises(UserError, match="no class 'bird'"):
        network.trainable(config, ["bird"], "backbone", 0)


def test_it_is_the_frozen_tower_where_nothing_was_trained(tmp_path: Path) -> None:
    config, _ = configured("cifar", tmp_path)
    tower = network.load(config)
    assert isinstance(tower, ImageClassifier)
    started = network.trainable(config, NAMES, "backbone", 0).eval()
    with torch.no_grad():
        features, _ = started(pixels())
        expected = tower.features(tower.normalize(pixels()))
    assert features.numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6)


def test_from_scratch_the_seed_decides(tmp_path: Path) -> None:
    config = BackboneConfig(
        name="new", kind="cifar", model="resnet20", untrained=True, preprocessing=HOW
    )
    resolved = network.resolve(config, Storage.open(str(tmp_path)))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, again, other = (
        network.trainable(resolved, NAMES, "random", s).state() for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])
    assert first["linear.weight"].shape == (5, 64)


def test_a_backbone_without_weights_is_said_to_have_none(tmp_path: Path) -> None:
    config = BackboneConfig(
        name="new", kind="cifar", model="resnet20", untrained=True, preprocessing=HOW,
        class_names=NAMES,
    )  # fmt: skip
    resolved = network.resolve(config, Storage.open(str(tmp_path)))
    with pytest.raises(UserError, match="it has no weights"):
        network.load(resolved)
    with pytest.raises(UserError, match="it has no weights"):
        network.trainable(resolved, NAMES, "backbone", 0)


def test_a_vision_language_model_is_not_trained_end_to_end() -> None:
    config = BackboneConfig(name="clip", kind="open_clip", model="RN50", pretrained="openai")
    with pytest.raises(UserError, match="not trained end to end"):
        network.trainable(config, NAMES, "backbone", 0)


def test_a_projection_has_unit_length_and_is_not_kept(tmp_path: Path) -> None:
    config, _ = configured("cifar", tmp_path)
    started = network.trainable(config, NAMES, "backbone", 0)
    names = set(started.state())
    started.project(16, 0)
    _, _, projections = started(pixels())
    assert np.linalg.norm(projections.detach().numpy(), axis=1) == pytest.approx(np.ones(6))
    assert projections.shape == (6, 16)
    assert set(started.state()) == names
