import io
import json
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.backbones import network, open_clip_files, templates
from pipelines.backbones.clip import Clip
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer
from pipelines.config import UserError
from pipelines.data.images import decode
from pipelines.data.storage import Storage

Files = dict[str, tuple[Path, Path]]


def config_of(files: Files, tower: str, **more: object) -> BackboneConfig:
    architecture, weights = files[tower]
    return BackboneConfig(name=tower, config=str(architecture), path=str(weights), **more)


def encode(loaded: Clip, contents: list, threads: int = 1) -> tuple[np.ndarray, list]:
    preparer = Preparer(loaded.crop, threads=threads)
    keys = [str(number) for number in range(len(contents))]
    encoded = Encoder(loaded, batch_size=8).encode(preparer.batches(keys, contents, 8))
    return encoded.columns["feature"], encoded.verdicts


def reference(files: Files, tower: str) -> open_clip.CLIP:
    architecture, weights = files[tower]
    model = open_clip.CLIP(**json.loads(architecture.read_text()))
    model.load_state_dict(load_file(weights))
    return model.eval()


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_features_are_open_clips_own(backbone_files: Files, pictures: Path, tower: str) -> None:
    loaded = network.load(config_of(backbone_files, tower))
    contents = [path.read_bytes() for path in sorted(pictures.rglob("*.jpg"))]
    features, verdicts = encode(loaded, contents)
    model = reference(backbone_files, tower)
    size = json.loads(backbone_files[tower][0].read_text())["vision_cfg"]["image_size"]
    transform = open_clip.image_transform(size, is_train=False)
    with torch.no_grad():
        pixels = [transform(Image.open(io.BytesIO(content))) for content in contents]
        expected = torch.cat([model.encode_image(p[None], normalize=True) for p in pixels])
    assert verdicts == [None] * 30
    np.testing.assert_allclose(features, expected.numpy(), rtol=0, atol=1e-5)
    assert torch.equal(loaded.preprocess(decode(contents[0])), pixels[0])
    with torch.no_grad():
        tokens = open_clip.SimpleTokenizer(context_length=16)(["a cat", "two dogs"])
        texts = model.encode_text(tokens, normalize=True)
    np.testing.assert_allclose(loaded.encode_text(["a cat", "two dogs"]), texts, rtol=0, atol=1e-6)
    assert loaded.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_bad_image_changes_no_other_feature(backbone_files: Files, pictures: Path) -> None:
    loaded = network.load(config_of(backbone_files, "vit"))
    contents = [path.read_bytes() for path in sorted(pictures.rglob("*.jpg"))]
    whole, _ = encode(loaded, contents)
    mixed = [*contents[:3], b"", FileNotFoundError("gone"), *contents[3:5]]
    features, verdicts = encode(loaded, mixed, threads=2)
    reasons = [None if verdict is None else verdict.reason for verdict in verdicts]
    assert reasons == [None, None, None, "empty", "missing", None, None]
    np.testing.assert_allclose(features, whole[:5], rtol=0, atol=1e-6)
    nothing, verdicts = encode(loaded, [b"", b"no"])
    assert nothing.shape == (0, 16)
    assert all(verdicts)


def test_a_feature_that_is_not_finite_is_rejected(
    backbone_files: Files, pictures: Path, tmp_path: Path
) -> None:
    architecture, weights = backbone_files["vit"]
    state = load_file(weights)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    config = BackboneConfig(
        name="bad", config=str(architecture), path=str(tmp_path / "bad.safetensors")
    )
    content = next(pictures.rglob("*.jpg")).read_bytes()
    features, verdicts = encode(network.load(config), [content])
    assert features.shape == (0, 16)
    assert verdicts[0] is not None
    assert verdicts[0].reason == "not_finite"


def test_resolve_is_idempotent_and_names_files(backbone_files: Files, tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    once = network.resolve(config_of(backbone_files, "vit"), storage)
    assert network.resolve(once, storage) == once
    assert Path(str(once.path)).is_absolute()


def test_identity_follows_weights_architecture_and_precision(
    backbone_files: Files, tmp_path: Path
) -> None:
    config = config_of(backbone_files, "vit")
    base = network.identity(config)
    assert base == network.load(config).identity
    assert network.identity(config.model_copy(update={"name": "other"})) == base
    state = load_file(backbone_files["vit"][1])
    state["logit_scale"] += 1
    save_file(state, tmp_path / "other.safetensors")
    architecture = json.loads(backbone_files["vit"][0].read_text())
    architecture["vision_cfg"]["image_size"] = 64
    (tmp_path / "other.json").write_text(json.dumps(architecture))
    changes = {
        "precision": ("precision", "bf16"),
        "path": ("weights", str(tmp_path / "other.safetensors")),
        "config": ("preprocessing", str(tmp_path / "other.json")),
    }
    for field, (part, value) in changes.items():
        other = network.identity(config.model_copy(update={field: value}))
        assert other[part] != base[part]
    # The same path with new content is another backbone.
    moving = tmp_path / "moving.safetensors"
    moved = config.model_copy(update={"path": str(moving)})
    save_file(load_file(backbone_files["vit"][1]), moving)
    assert network.identity(moved)["weights"] == base["weights"]
    save_file(state, moving)
    assert network.identity(moved)["weights"] != base["weights"]


def test_openai_weights_need_quick_gelu(backbone_files: Files, tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    path = str(backbone_files["vit"][1])
    with pytest.raises(UserError, match=r"QuickGELU.*backbone\.model=ViT-B-16-quickgelu"):
        network.resolve(
            BackboneConfig(name="x", model="ViT-B-16", pretrained="openai", path=path), storage
        )
    with pytest.raises(UserError, match="no weights 'laion2b_s34b_b88k'"):
        network.resolve(
            BackboneConfig(name="x", model="ViT-B-16-quickgelu", pretrained="laion2b_s34b_b88k"),
            storage,
        )


def test_offline_without_weights_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_tag: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip_files, "_cached", lambda _hub: None)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", refuse)
    config = BackboneConfig(name="vit_b16", model="ViT-B-16-quickgelu", pretrained="openai")
    with pytest.raises(UserError) as caught:
        network.resolve(config, Storage.open(str(tmp_path)))
    message = str(caught.value)
    assert "backbone vit_b16" in message
    assert "backbone.path=FILE" in message
    assert "\n" not in message


def test_no_weights_never_means_random_weights(backbone_files: Files, tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    architecture, weights = backbone_files["vit"]
    for config, message in (
        (BackboneConfig(name="x", config=str(architecture)), "no weights named"),
        (BackboneConfig(name="x", model="ViT-B-16"), "no weights named"),
        (BackboneConfig(name="x", model="ViT-B-999"), "open_clip has no model"),
        (BackboneConfig(name="x"), "give one of"),
        (BackboneConfig(name="x", config=str(architecture), path="none.pt"), "no file none.pt"),
        (BackboneConfig(name="x", config="none.json", path=str(weights)), "no file none.json"),
    ):
        with pytest.raises(UserError, match=message):
            network.resolve(config, storage)
    with pytest.raises(UserError, match="not resolved"):
        network.load(BackboneConfig(name="x", config=str(architecture)))
    state = load_file(weights)
    state.pop("visual.proj")
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"does not hold the weights.*visual\.proj"):
        network.load(config_of({"vit": (architecture, tmp_path / "part.safetensors")}, "vit"))


def test_files_that_can_run_code_are_refused(backbone_files: Files, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    architecture, weights = backbone_files["vit"]
    with (tmp_path / "trap.pt").open("wb") as file:
        pickle.dump({"state_dict": Trap()}, file, protocol=2)
    torch.save({"state_dict": Trap()}, tmp_path / "trap2.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what OpenAI's files are
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    for name in ("trap.pt", "trap2.pt", "script.pt"):
        with pytest.raises(UserError):
            network.load(config_of({"vit": (architecture, tmp_path / name)}, "vit"))
    assert not (tmp_path / "sprung").exists()
    torch.save(load_file(weights), tmp_path / "plain.pt")
    plain = network.load(config_of({"vit": (architecture, tmp_path / "plain.pt")}, "vit"))
    safe = network.load(config_of(backbone_files, "vit"))
    assert torch.equal(plain.encode_text(["cat"]), safe.encode_text(["cat"]))


def test_templates_fill_once() -> None:
    assert templates.prompts(["cat", "dog"], ["a {}.", "{}"]) == ["a cat.", "cat", "a dog.", "dog"]
    assert templates.templates("simple") == ("a photo of a {}.",)
    assert len(templates.templates("imagenet80")) == 80
    for bad in ("no place", "{} and {}"):
        with pytest.raises(UserError, match="once"):
            templates.fill(bad, "cat")
    with pytest.raises(UserError, match="allowed: imagenet7"):
        templates.templates("none")


@pytest.mark.parametrize("name", sorted(templates.NAMES))
def test_every_template_set_fills(name: str) -> None:
    assert all("cat" in text for text in templates.prompts(["cat"], templates.templates(name)))


def test_the_preprocessing_of_a_file_is_open_clips_default() -> None:

    assert asdict(PreprocessCfg()) == open_clip_files.PREPROCESSING
