"""Local features against forwards written out by hand, and augmented views."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pipelines.backbones import clip
from pipelines.backbones.clip import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer, Views
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


def load_both(files: Files, tower: str) -> tuple[clip.Clip, open_clip.CLIP, dict[str, np.ndarray]]:
    architecture, weights = files[tower]
    config = BackboneConfig(name=tower, config=str(architecture), path=str(weights))
    model = open_clip.CLIP(**json.loads(architecture.read_text()))
    state = load_file(weights)
    model.load_state_dict(state)
    return clip.load(config), model.eval(), {k: v.double().numpy() for k, v in state.items()}


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
    assert loaded.num_patches == 16
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


def test_an_unknown_tower_is_refused() -> None:
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    with pytest.raises(UserError, match="Linear has no known value path"):
        encode_with_local(model, torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_extra_columns_leave_the_feature_alone(
    backbone_files: Files, pictures: Path, tower: str
) -> None:
    loaded, _, _ = load_both(backbone_files, tower)
    contents: list[bytes | Exception] = [p.read_bytes() for p in sorted(pictures.rglob("*.jpg"))]
    contents[4] = b""
    keys = [str(number) for number in range(30)]
    views = Views(2, seed=1)
    plain = Encoder(loaded, 8).encode(Preparer(loaded.crop).batches(keys, contents, 8))
    preparer = Preparer(loaded.crop, views=views)
    full = Encoder(loaded, 8, local_features=True, views=2).encode(
        preparer.batches(keys, contents, 8)
    )
    patches = loaded.num_patches
    assert {name: c.shape for name, c in full.columns.items()} == {
        "feature": (29, 16),
        "local_features": (29, patches, 16),
        "views": (29, 2, 16),
    }
    assert np.array_equal(full.columns["feature"], plain.columns["feature"])
    for column in full.columns.values():
        np.testing.assert_allclose(np.linalg.norm(column, axis=-1), 1, atol=1e-6)
    nothing = Encoder(loaded, 8, local_features=True, views=2).encode([])
    assert nothing.columns["local_features"].shape == (0, patches, 16)


def test_views_follow_seed_and_key_and_stay_inside() -> None:
    ramp = np.zeros((60, 90, 3), np.uint8)
    ramp[..., 0] = np.arange(90)[None] * 2
    ramp[..., 1] = np.arange(60)[:, None] * 4
    image = Image.fromarray(ramp)
    views = Views(50, seed=3, smallest=0.5)
    made = [np.asarray(view).astype(int) for view in views.of("a", image, (32, 32))]
    again = [np.asarray(view).astype(int) for view in Views(50, 3, 0.5).of("a", image, (32, 32))]
    assert all(np.array_equal(one, two) for one, two in zip(made, again, strict=True))
    other = np.asarray(views.of("b", image, (32, 32))[0]).astype(int)
    assert not np.array_equal(made[0], other)
    assert not np.array_equal(made[0], np.asarray(Views(1, 4).of("a", image, (32, 32))[0]))
    mirrored = [view[0, 0, 0] > view[0, -1, 0] for view in made]
    assert 10 < sum(mirrored) < 40
    for view in made:  # the ramps say how much of the width and height a crop kept
        width = abs(view[16, -1, 0] - view[16, 0, 0]) / 178
        height = abs(view[-1, 16, 1] - view[0, 16, 1]) / 236
        assert 0.4 < width * height <= 1.0
    assert len({int(view[16, 16, 0]) for view in made}) > 10
