"""Towers run by onnxruntime: the features of torch but for rounding, and what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipelines.backbones import network, onnx_engine
from pipelines.backbones.clip import Clip
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.kinds import cifar
from pipelines.backbones.tower import Tower
from pipelines.config import UserError
from pipelines.data.storage import Storage
from tests.backbones.test_classifier import as_trained, config_of, loaded

BATCH = 3


def clip(files: tuple[Path, Path]) -> Tower:
    architecture, weights = files
    config = BackboneConfig(name="tiny", config=str(architecture), path=str(weights))
    return network.load(network.resolve(config, Storage.open(str(weights.parent))))


@pytest.fixture(params=["vit", "resnet", "cifar"])
def tower(
    request: pytest.FixtureRequest,
    backbone_files: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> Tower:
    if request.param != "cifar":
        return clip(backbone_files[request.param])
    model = as_trained(cifar.NETWORKS["resnet20"](5))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return loaded(config_of("cifar", "resnet20", tmp_path / "weights.safetensors"), tmp_path)


def test_features_are_those_of_torch(tower: Tower) -> None:
    encode = onnx_engine.engine(tower, BATCH, threads=1)
    pixels = torch.rand(BATCH, 3, *tower.image_size, generator=torch.Generator().manual_seed(1))
    expected = tower.encode_image(pixels).double()
    assert expected.std() > 0
    distance = (encode(pixels) - expected).norm(dim=1) / expected.norm(dim=1)
    assert distance.max() < 1e-5
    assert torch.equal(encode(pixels), encode(pixels))


@dataclass(frozen=True, kw_only=True)
class Changing(Clip):
    """A tower whose features depend on more than the pixels, which an export would lose."""

    calls: list[int]

    def features(self, pixels: Tensor) -> Tensor:
        self.calls.append(0)
        return super().features(pixels * len(self.calls))


@dataclass(frozen=True, kw_only=True)
class OfPixels(Clip):
    """A tower that asks for the values of its pixels, which an export cannot know."""

    def features(self, pixels: Tensor) -> Tensor:
        return super().features(pixels if pixels.sum().item() > 0 else -pixels)


def test_a_tower_that_onnxruntime_computes_otherwise_is_refused(
    backbone_files: dict[str, tuple[Path, Path]],
) -> None:
    usual = vars(clip(backbone_files["vit"]))
    with pytest.raises(UserError, match=r"features are .* from torch's.*embed\.engine=torch"):
        onnx_engine.engine(Changing(**usual, calls=[]), BATCH, threads=1)
    with pytest.raises(UserError, match=r"tiny: cannot be exported.*embed\.engine=torch") as error:
        onnx_engine.engine(OfPixels(**usual), BATCH, threads=1)
    assert len(str(error.value).splitlines()) == 1


def test_what_cannot_be_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackboneConfig(name="mine")

    def check(config: BackboneConfig, *, on_gpu: bool = False, local: bool = False) -> None:
        onnx_engine.check(config, on_gpu=on_gpu, local_features=local)

    check(config)
    with pytest.raises(UserError, match=r"compute\.embed_gpus=0"):
        check(config, on_gpu=True)
    with pytest.raises(UserError, match=r"came backbone\.precision=bf16"):
        check(config.model_copy(update={"precision": "bf16"}))
    with pytest.raises(UserError, match="engine=onnxruntime gives no local features"):
        check(config, local=True)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(UserError, match="needs onnxscript: pip install onnxscript, or embed"):
        check(config)
