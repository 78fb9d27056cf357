"""Image classifiers from files: the library's own logits, renamed parameters, what is refused."""

from __future__ import annotations

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
from pipelines.backbones.encoder import Encoder
from pipelines.backbones.kinds import cifar
from pipelines.backbones.pixel_pass import LayerPass
from pipelines.config import UserError
from pipelines.data.storage import Storage

NAMES = ["cat", "dog", "horse", "ship", "truck"]
HOW = Preprocessing(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def as_trained(model: nn.Module) -> nn.Module:
    """Seeded weights, and statistics of batch normalisation that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator)).abs_()
    return model.eval()


def theirs(kind: str) -> tuple[str, nn.Module]:
    """A small network of each library, as the library builds it."""
    if kind == "timm":
        return "tf_efficientnet_lite0", timm.create_model("tf_efficientnet_lite0", num_classes=5)
    if kind == "torchvision":
        return "resnet18", models.resnet18(num_classes=5)
    return "resnet20", cifar.NETWORKS["resnet20"](5)


def loaded(config: BackboneConfig, folder: Path) -> ImageClassifier:
    model = network.load(network.resolve(config, Storage.open(str(folder))))
    assert isinstance(model, ImageClassifier)
    return model


def config_of(kind: str, model: str, path: Path, **more: object) -> BackboneConfig:
    settings = {"name": "mine", "kind": kind, "model": model, "path": str(path)}
    return BackboneConfig(**settings, class_names=NAMES, preprocessing=HOW, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["timm", "torchvision", "cifar"])
def test_logits_are_those_of_the_librarys_own_network(kind: str, tmp_path: Path) -> None:
    name, model = theirs(kind)
    as_trained(model)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    ours = loaded(config_of(kind, name, tmp_path / "weights.safetensors"), tmp_path)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    ready = (pixels.permute(0, 3, 1, 2) / 255 - ours.mean) / ours.std
    with torch.no_grad():
        expected = model(ready).numpy()
    features = ours.encode_image(ours.normalize(pixels)).numpy()
    assert features.shape == (3, ours.embed_dim)
    logits = features @ ours.weight.T + ours.bias
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", cifar.NETWORKS)
def test_every_network_for_small_images_ends_in_activations(name: str, tmp_path: Path) -> None:
    model = cifar.NETWORKS[name](5)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt"
    )
    ours = loaded(config_of("cifar", name, tmp_path / "w.pt"), tmp_path)
    width = {"resnet18": 512, "resnet34": 512, "wrn40_2": 128, "densenet100": 342}.get(name, 64)
    features = ours.encode_image(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, width)
    assert (features >= 0).all()


def test_parameters_of_other_names_are_mapped_by_rules(tmp_path: Path) -> None:
    model = as_trained(cifar.NETWORKS["resnet20"](5))
    other = {
        k.replace("linear.", "fc.").replace("layer", "stage_"): v
        for k, v in model.state_dict().items()
    }
    safetensors.torch.save_file(other, tmp_path / "w.safetensors")
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"lacks .*backbone\.rename"):
        loaded(config_of("cifar", "resnet20", path), tmp_path)
    rules = {r"^fc\.": "linear.", r"^stage_": "layer"}
    ours = loaded(config_of("cifar", "resnet20", path, rename=rules), tmp_path)
    assert np.array_equal(ours.weight, model.state_dict()["linear.weight"].numpy())


def test_what_decides_a_feature_is_its_identity(tmp_path: Path) -> None:
    for number in (0, 1):
        model = cifar.NETWORKS["resnet20"](5)
        safetensors.torch.save_file(model.state_dict(), tmp_path / f"{number}.safetensors")
    one = config_of("cifar", "resnet20", tmp_path / "0.safetensors")
    same = network.identity(one)
    assert network.identity(one.model_copy(update={"name": "another"})) == same
    for change in (
        {"path": str(tmp_path / "1.safetensors")},
        {"precision": "bf16"},
        {"preprocessing": HOW.model_copy(update={"resize": 40})},
        {"rename": {"a": "b"}},
    ):
        assert network.identity(one.model_copy(update=change)) != same, change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": None}, r"needs backbone\.class_names="),
        ({"preprocessing": None}, r"needs backbone\.preprocessing="),
        ({"model": "resnet21"}, "no network 'resnet21'; allowed: resnet8"),
        ({"path": None}, "no weights named"),
        ({"path": "nowhere.safetensors"}, r"no file nowhere\.safetensors"),
        ({"class_names": ["cat", "cat"]}, "'cat' stands twice"),
        ({"class_names": NAMES[:4]}, r"linear\.weight is \(5, 64\), not \(4, 64\)"),
        ({"class_names": "names.txt"}, r"class_names=names\.txt"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(cifar.NETWORKS["resnet20"](5).state_dict(), path)
    config = config_of("cifar", "resnet20", path).model_copy(update=change)
    with pytest.raises(UserError, match=message) as error:
        loaded(config, tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_objects_and_damaged_files_are_not_weights(tmp_path: Path) -> None:
    torch.save(cifar.NETWORKS["resnet20"](5), tmp_path / "model.pt")  # a pickled module
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    torch.save({"epoch": 3}, tmp_path / "state.pt")
    for name, message in (
        ("model.pt", "holds objects, not only weights"),
        ("cut.safetensors", "holds no weights"),
        ("state.pt", "holds no state dict"),
    ):
        with pytest.raises(UserError, match=message):
            loaded(config_of("cifar", "resnet20", tmp_path / name), tmp_path)


def test_local_features_are_said_to_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(cifar.NETWORKS["resnet20"](5).state_dict(), path)
    with pytest.raises(UserError, match="no local features"):
        loaded(config_of("cifar", "resnet20", path), tmp_path).encode_with_local(torch.zeros(1))


def test_layers_are_mean_activations_side_by_side(tmp_path: Path) -> None:
    model = cifar.NETWORKS["resnet20"](5)
    as_trained(model)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    config = config_of("cifar", "resnet20", path, layers={"layer3": 64, "layer1": 16})
    ours = loaded(config, tmp_path)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model.layer1(model.bn1(model.conv1(pixels)).relu())
        last = model.layer3(model.layer2(first))
    expected = torch.cat([last.mean(dim=(2, 3)), first.mean(dim=(2, 3))], dim=1)
    torch.testing.assert_close(ours.layers(pixels), expected, rtol=1e-4, atol=0)
    images = (255 * pixels).byte().permute(0, 2, 3, 1)
    how = LayerPass(config.layers)
    assert how.width(ours) == 80
    found = Encoder(ours, 4, pixel_pass=how).encode([list(images.numpy())]).columns["feature"]
    np.testing.assert_allclose(found, ours.layers(ours.normalize(images)), rtol=1e-4)
    assert Encoder(ours, 4, pixel_pass=how).encode([]).columns["feature"].shape == (0, 80)
    # The order is what stands side by side, so it is in the address.
    assert how.identity() != LayerPass({"layer1": 16, "layer3": 64}).identity()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layer9": 16}, r"no place 'layer9' in resnet20; there are conv1, bn1, layer1, layer2"),
        ({"layer1": 17}, r"layer1 gives \(16, 32, 32\) an image, not \(17, H, W\)"),
        ({"linear": 64}, r"linear gives \(64,\) an image, not \(64, H, W\)"),
    ],
)
def test_layers_that_the_network_has_not_are_refused(
    layers: dict[str, int], message: str, tmp_path: Path
) -> None:
    model = as_trained(cifar.NETWORKS["resnet20"](5))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config = config_of("cifar", "resnet20", tmp_path / "weights.safetensors", layers=layers)
    with pytest.raises(UserError, match=rf"mine: backbone\.layers: {message}"):
        loaded(config, tmp_path)


def test_a_backbone_without_layers_says_so(tmp_path: Path) -> None:
    model = as_trained(cifar.NETWORKS["resnet20"](5))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    ours = loaded(config_of("cifar", "resnet20", tmp_path / "weights.safetensors"), tmp_path)
    with pytest.raises(UserError, match="it names no layers"):
        ours.layers(torch.zeros(1, 3, 32, 32))
