"""Local features against forwards written out by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file
from torch import nn

from pipelines.backbones import network
from pipelines.backbones.clip import Clip
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer
from pipelines.backbones.local import encode_with_local
from pipelines.config import UserError

Files = dict[str, tuple[Path, Path]]
PIXELS = {"vit": 32, "resnet": 64}


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def vit_by_hand(state: dict[str, np.ndarray], entering: np.ndarray) -> np.ndarray:
    """The value path of one patch, from what enters the last block, vector by vector."""
    block = "visual.transformer.resblocks.1."

    def p(name: str) -> np.ndarray:
        return state[block + name]

    width = len(entering)
    normed = layer_norm(entering, p("ln_1.weight"), p("ln_1.bias"))
    value = p("attn.in_proj_weight")[2 * width :] @ normed + p("attn.in_proj_bias")[2 * width :]
    x = entering + p("attn.out_proj.weight") @ value + p("attn.out_proj.bias")
    normed = layer_norm(x, p("ln_2.weight"), p("ln_2.bias"))
    hidden = gelu(p("mlp.c_fc.weight") @ normed + p("mlp.c_fc.bias"))
    x = x + p("mlp.c_proj.weight") @ hidden + p("mlp.c_proj.bias")
    x = layer_norm(x, state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return x @ state["visual.proj"]


def load_both(files: Files, tower: str) -> tuple[Clip, open_clip.CLIP, dict[str, np.ndarray]]:
    architecture, weights = files[tower]
    config = BackboneConfig(name=tower, config=str(architecture), path=str(weights))
    model = open_clip.CLIP(**json.loads(architecture.read_text()))
    state = load_file(weights)
    model.load_state_dict(state)
    return network.load(config), model.eval(), {k: v.double().numpy() for k, v in state.items()}


def test_vit_local_features_are_the_value_path(backbone_files: Files) -> None:
    loaded, model, state = load_both(backbone_files, "vit")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        visual = model.visual
        entering = visual.transformer.resblocks[0](visual._embeds(pixels)).double().numpy()
        plain = model.encode_image(pixels, normalize=True)
    features, local = loaded.encode_with_local(pixels)
    torch.testing.assert_close(features, plain, rtol=0, atol=1e-6)
    assert local.shape == (2, 16, 16)
    assert loaded.num_local == 16
    for image in range(2):
        for patch in range(16):
            expected = vit_by_hand(state, entering[image, 1 + patch])
            expected /= np.linalg.norm(expected)
            np.testing.assert_allclose(local[image, patch], expected, rtol=0, atol=2e-6)


def test_resnet_local_features_are_the_value_path(backbone_files: Files) -> None:
    loaded, model, state = load_both(backbone_files, "resnet")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    visual = model.visual
    with torch.no_grad():
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        plain = model.encode_image(pixels, normalize=True)
    features, local = loaded.encode_with_local(pixels)
    torch.testing.assert_close(features, plain, rtol=0, atol=1e-6)
    assert local.shape == (2, 4, 16)
    pool = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith("visual.attnpool.")}
    for image in range(2):
        for row in range(2):
            for column in range(2):
                cell = x[image, :, row, column].double().numpy()
                value = pool["v_proj.weight"] @ cell + pool["v_proj.bias"]
                expected = pool["c_proj.weight"] @ value + pool["c_proj.bias"]
                expected /= np.linalg.norm(expected)
                found = local[image, 2 * row + column]
                np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def timm_clip(**vision: object) -> nn.Module:
    described = {"timm_pool": "avg", "timm_proj": "linear", "image_size": 64, **vision}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.CustomTextCLIP(16, described, text).eval()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t"])
def test_the_feature_of_a_mean_is_the_mean_of_local_features(name: str) -> None:
    model = timm_clip(timm_model_name=name, timm_proj_bias=True)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, local = encode_with_local(model, pixels)
        plain = model.encode_image(pixels)
        maps = model.visual.trunk.forward_features(pixels)
    torch.testing.assert_close(features, plain, rtol=0, atol=0)
    assert local.shape == (2, 4, 16)
    torch.testing.assert_close(local.mean(dim=1), plain, rtol=0, atol=1e-5)
    weight, bias = (p.detach().double().numpy() for p in model.visual.head.proj.parameters())
    for row in range(2):
        for column in range(2):
            expected = weight @ maps[1, :, row, column].double().numpy() + bias
            found = local[1, 2 * row + column].double().numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "vision",
    [
        {"timm_model_name": "mobilenetv3_small_050"},  # a layer after the pooling
        {"timm_model_name": "resnet10t", "timm_proj": "mlp"},
        {"timm_model_name": "resnet10t", "timm_pool": "max"},
        {"timm_model_name": "resnet10t", "timm_proj": ""},
    ],
)
def test_a_tower_with_more_than_a_mean_and_a_layer_is_refused(vision: dict[str, object]) -> None:
    with pytest.raises(UserError, match="TimmModel has no known value path; allowed: "):
        encode_with_local(timm_clip(**vision), torch.zeros(1, 3, 64, 64))


def test_an_unknown_tower_is_refused() -> None:
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    with pytest.raises(UserError, match="Linear has no known value path"):
        encode_with_local(model, torch.zeros(1, 3, 2, 2))


def timm_tower(**options: str) -> SimpleNamespace:
    """A CLIP's image side from timm, with statistics as if trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        visual = TimmModel("tf_efficientnet_lite0", 24, 96, proj_bias=True, **options).eval()
    return SimpleNamespace(visual=visual, encode_image=visual)


@torch.no_grad()
def test_places_of_an_averaged_map_are_projected_and_their_mean_is_the_feature() -> None:
    model = timm_tower()
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    features, local = encode_with_local(model, pixels)
    maps = model.visual.trunk.forward_features(pixels).double().numpy()
    weight = model.visual.head.proj.weight.double().numpy()
    bias = model.visual.head.proj.bias.double().numpy()
    assert local.shape == (2, 9, 24)
    for image, row, column in np.ndindex(2, 3, 3):
        expected = weight @ maps[image, :, row, column] + bias
        np.testing.assert_allclose(local[image, 3 * row + column], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(local.mean(dim=1), features)
    torch.testing.assert_close(features, model.visual(pixels))


@pytest.mark.parametrize("options", [{"pool": "max"}, {"proj": "mlp"}, {"pool": "rot_attn"}])
def test_towers_of_timm_that_do_more_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match="TimmModel has no known value path"):
        encode_with_local(timm_tower(**options), torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_local_features_leave_the_feature_alone(
    backbone_files: Files, pictures: Path, tower: str
) -> None:
    loaded, _, _ = load_both(backbone_files, tower)
    contents: list[bytes | Exception] = [p.read_bytes() for p in sorted(pictures.rglob("*.jpg"))]
    contents[4] = b""
    keys = [str(number) for number in range(30)]
    plain = Encoder(loaded, 8).encode(Preparer(loaded.crop).batches(keys, contents, 8))
    preparer = Preparer(loaded.crop)
    full = Encoder(loaded, 8, local_features=True).encode(preparer.batches(keys, contents, 8))
    count = loaded.num_local
    assert {name: c.shape for name, c in full.columns.items()} == {
        "feature": (29, 16),
        "local_features": (29, count, 16),
    }
    assert np.array_equal(full.columns["feature"], plain.columns["feature"])
    for column in full.columns.values():
        np.testing.assert_allclose(np.linalg.norm(column, axis=-1), 1, atol=1e-6)
    nothing = Encoder(loaded, 8, local_features=True).encode([])
    assert nothing.columns["local_features"].shape == (0, count, 16)
