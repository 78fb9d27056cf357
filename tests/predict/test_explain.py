"""`explain=true`: what it says is the model's own, and what a model lacks is one clear line."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import create_model

from jobs import main
from jobs import predict as job
from pipelines.backbones import mini, network
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.tower import Tower
from pipelines.config import UserError
from pipelines.data.digits import DigitsSource
from pipelines.data.kept import Entry, FileSeal, write_record
from pipelines.data.storage import Storage
from pipelines.heads import Predictor
from pipelines.ood.negatives import NegativeLabels
from pipelines.plots import heat_map
from pipelines.predict.explain import Explanation, explain_images
from pipelines.predict.stage import MAX_EXPLAINED, PredictConfig, Prediction, run
from pipelines.records import StoredRecord
from pipelines.register.detector import EXAMPLES, FILE, Detector, DetectorRecord
from pipelines.register.examples import Examples
from tests.small_network import NAMES, write_network

CLASSES = ("cat", "dog", "fox", "owl", "bee", "ant")
WORDS = tuple(f"word {n}" for n in range(7))
GL = {"tau": 0.3, "weight": 0.7}


def unit(seed: int, rows: int, dim: int = 16) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((50, 40)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tower(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    architecture, weights = backbone_files["vit"]
    return BackboneConfig(name="tiny", config=str(architecture), path=str(weights))


@pytest.fixture(scope="module")
def full(tower: BackboneConfig) -> Detector:
    """A model that has everything but negative words: its score is gl_mcm."""
    examples = Examples(
        tuple(f"train/{n}.png" for n in range(9)),
        np.arange(9) % 6,
        unit(2, 9).astype(np.float16),
    )
    return Detector(
        Predictor("zero_shot", {"text_features": unit(1, 6)}, {}, 11.5, CLASSES),
        tower,
        "gl_mcm",
        GL,
        0.5,
        temperature=2.5,
        batch_size=4,
        examples=examples,
    )


def explained(detector: Detector, *contents: bytes) -> list[Explanation]:
    found = explain_images(detector, contents)
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def encoded(config: BackboneConfig, content: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop, feature and local features of an image, by the tower alone."""
    loaded: Tower = network.load(config)
    crop = np.asarray(loaded.crop(Image.open(io.BytesIO(content)).convert("RGB")))
    pixels = loaded.normalize(torch.tensor(crop[None]))
    feature, local = (x.numpy() for x in loaded.encode_with_local(pixels))
    return crop, feature[0].astype(np.float64), local[0].astype(np.float64)


def test_everything_is_what_the_tower_and_the_head_give(
    full: Detector, tower: BackboneConfig
) -> None:
    contents = [png(seed) for seed in range(3)]
    verdicts = full.judge_images(contents).to_pylist()
    text = full.predictor.arrays["text_features"].astype(np.float64)
    assert full.examples is not None
    for content, one, verdict in zip(contents, explained(full, *contents), verdicts, strict=True):
        crop, feature, local = encoded(tower, content)
        logits = 11.5 * (text @ feature)
        shares = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum()
        best = np.argsort(-shares)[:5]
        assert [entry.name for entry in one.classes] == [CLASSES[k] for k in best]
        assert [e.value for e in one.classes] == pytest.approx(shares[best].tolist(), abs=1e-5)
        assert one.classes[0].name == verdict["class_name"]
        assert one.classes[0].value == pytest.approx(verdict["confidence"], abs=1e-9)

        cosines = full.examples.features.astype(np.float64) @ feature
        nearest = np.argsort(-cosines)[:5]
        assert [entry.key for entry in one.nearest] == [f"train/{n}.png" for n in nearest]
        assert [entry.class_name for entry in one.nearest] == [CLASSES[n % 6] for n in nearest]
        found = [entry.cosine for entry in one.nearest]
        assert found == pytest.approx(cosines[nearest].tolist(), abs=1e-5)

        assert one.patches is not None
        np.testing.assert_array_equal(one.patches.crop, crop)
        shares = np.exp(local @ text.T / 0.3)
        by_hand = (shares.max(axis=1) / shares.sum(axis=1)).reshape(4, 4)
        np.testing.assert_allclose(one.patches.values, by_hand, rtol=0, atol=1e-6)
        whole = np.exp(text @ feature / 0.3)
        score = whole.max() / whole.sum() + 0.7 * one.patches.values.max()
        assert verdict["score"] == pytest.approx(score, abs=1e-6)
        assert one.words == ()
        assert one.missing == ("no negative words: the model judges by gl_mcm, not by neg_label",)


def test_the_strongest_negative_words_have_the_largest_cosines(
    full: Detector, tower: BackboneConfig, tmp_path: Path
) -> None:
    features = unit(3, 7)
    records = {"neg_label": NegativeLabels(torch.tensor(features))}
    judging = replace(full, score="neg_label", params={"tau": 0.1}, records=records, words=WORDS)
    judging.save(tmp_path)
    loaded = Detector.load(tmp_path)
    (one,) = explained(loaded, png(0))
    cosines = features.astype(np.float64) @ encoded(tower, png(0))[1]
    best = np.argsort(-cosines)[:5]
    assert [entry.name for entry in one.words] == [WORDS[n] for n in best]
    assert [e.value for e in one.words] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    assert one.missing == ()
    assert one.patches is not None
    assert one.patches.score == "mcm"
    (without,) = explained(replace(loaded, words=()), png(0))
    assert without.words == ()
    assert without.missing[0].startswith("no negative words: the model was registered without")
    learned = dict(judging.predictor.arrays, negative_text_features=unit(4, 3))
    head = replace(judging.predictor, head="negprompt", arrays=learned)
    (of_prompts,) = explained(replace(judging, predictor=head), png(0))
    assert of_prompts.missing == ("no negative words: head negprompt learned its negatives",)


def test_a_model_of_before_is_explained_without_training_images(
    full: Detector, tmp_path: Path
) -> None:
    replace(full, examples=None).save(tmp_path)
    assert not (tmp_path / EXAMPLES).exists()
    written_before(tmp_path)
    loaded = Detector.load(tmp_path)
    assert (loaded.examples, loaded.words) == (None, ())
    (one,) = explained(loaded, png(0))
    assert one.nearest == ()
    assert one.patches is not None
    (line,) = [line for line in one.missing if "nearest" in line]
    assert line.startswith("no nearest training images: the model was registered without")
    assert "python -m jobs.register with the run's words" in line


def written_before(folder: Path) -> None:
    """Leave out of a saved detector's record what earlier versions did not write."""
    fields = DetectorRecord.model_fields.keys() - StoredRecord.model_fields.keys()
    kinds: dict[str, object] = {
        name: (DetectorRecord.model_fields[name].annotation, ...)
        for name in fields - {"num_examples", "words"}
    }
    earlier = create_model("Earlier", __base__=StoredRecord, **kinds)  # type: ignore[call-overload]
    entry = Entry(Storage(str(folder)), (), DetectorRecord, FILE)
    record = entry.read()
    values = {name: getattr(record, name) for name in kinds}
    files = {p.name: FileSeal.of_file(p) for p in folder.iterdir() if p.name != FILE}
    write_record(entry.storage, earlier(**values), FILE, files=files)
    assert not {"num_examples", "words"} & json.loads((folder / FILE).read_text()).keys()


def test_a_classifier_has_neither_map_nor_words(tmp_path: Path) -> None:
    write_network(tmp_path)
    config = BackboneConfig.model_validate_json((tmp_path / "seeded.yaml").read_bytes())
    weight = unit(5, 6, 64)
    head = Predictor(
        "classifier", {"weight": weight, "bias": np.zeros(6, np.float32)}, {}, 1.0, NAMES
    )
    rows = np.abs(unit(6, 8, 64)).astype(np.float16)
    known = Examples(tuple(map(str, range(8))), np.arange(8) % 6, rows)
    detector = Detector(head, config, "energy", {"tau": 1.0}, 0.0, examples=known)
    (one,) = explained(detector, png(0))
    crop = network.load(config).crop(Image.open(io.BytesIO(png(0))).convert("RGB"))
    loaded = network.load(config)
    pixels = loaded.normalize(torch.tensor(np.asarray(crop)[None]))
    feature = loaded.encode_image(pixels)[0].double().numpy()
    cosines = rows.astype(np.float64) @ feature / np.linalg.norm(feature)
    assert [entry.key for entry in one.nearest] == [str(n) for n in np.argsort(-cosines)[:5]]
    assert one.nearest[0].cosine == pytest.approx(cosines.max(), abs=1e-4)
    assert one.patches is None
    assert one.missing == (
        "no negative words: the model judges by energy, not by neg_label",
        "no map: head classifier compares no feature with text",
    )


def test_the_mini_backbone_has_no_map_and_says_why(mini_storage: Storage) -> None:
    architecture, weights = mini.ensure(mini_storage)
    config = BackboneConfig(name="mini", config=str(architecture), path=str(weights))
    text = unit(1, 6, 64)
    head = Predictor("zero_shot", {"text_features": text}, {}, 11.5, CLASSES)
    images = DigitsSource().read(["digits/0000/plain", "digits/0001/noisy"])
    contents = [image for image in images if isinstance(image, bytes)]
    detector = Detector(head, config, "delta_energy", {"tau": 0.1, "c": 2}, 0.3)
    found = explained(detector, *contents)
    classes = [verdict["class_name"] for verdict in detector.judge_images(contents).to_pylist()]
    assert [one.classes[0].name for one in found] == classes
    for one in found:
        assert one.patches is None
        assert one.missing[-1] == (
            "no map: the backbone gives one local feature an image, which is no map"
        )


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["jobs.predict", "explain=true", *words])
    main("predict", job.section, job.predict, job.__doc__)
    return capsys.readouterr().out


def test_the_command_writes_maps_and_says_what_is_missing_once(
    full: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full.save(tmp_path / "model")
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(5):
        (images / f"{seed} a\x1b[2J.png").write_bytes(png(seed))
    (images / "3bad.png").write_bytes(b"no image")
    words = f"source={images}", f"model={tmp_path / 'model'}"
    lines = told(capsys, monkeypatch, *words, f"storage={tmp_path}").splitlines()
    heads = [line.split()[0] for line in lines if line.startswith("  ")]
    assert heads == ["classes", "nearest", "map"] * 5
    assert lines[-1] == "no negative words: the model judges by gl_mcm, not by neg_label"
    assert sum("no negative words" in line for line in lines) == 1
    bad = next(n for n, line in enumerate(lines) if "not judged" in line)
    assert not lines[bad + 1].startswith("  ")
    written = sorted(path.name for path in (tmp_path / "explained").iterdir())
    order = [1, 2, 3, 4, 6]  # 3bad.png is the fifth
    assert written == [f"{n:03d}-{seed}_a__2J.png" for seed, n in enumerate(order)]
    explanations = explained(full, *(png(seed) for seed in range(5)))
    for name, one, line in zip(
        written, explanations, (line for line in lines if line.startswith("  map")), strict=True
    ):
        assert one.patches is not None
        assert f"{tmp_path}/explained/{name}: {one.patches.caption}" in line
        picture = np.asarray(Image.open(tmp_path / "explained" / name))
        # tests/report/test_figures.py says what a heat map is.
        drawn = np.asarray(heat_map(one.patches.crop, one.patches.values))
        assert picture.shape == (224, 224, 3)
        np.testing.assert_array_equal(picture, drawn)


def test_one_image_and_a_folder_of_the_users(full: Detector, tmp_path: Path) -> None:
    full.save(tmp_path / "model")
    (tmp_path / "x.png").write_bytes(png(0))
    config = PredictConfig(
        source=str(tmp_path / "x.png"),
        model=str(tmp_path / "model"),
        explain=True,
        explain_to=str(tmp_path / "maps" / "here"),
    )
    (found,) = run(config)
    (plain,) = run(config.model_copy(update={"explain": False}))
    assert found.map_file == str(tmp_path / "maps" / "here" / "001-x.png")
    assert Path(found.map_file).is_file()
    assert found.explanation is not None
    assert replace(found, explanation=None, map_file=None) == plain
    assert plain == Prediction(**{**vars(plain), "explanation": None, "map_file": None})


def test_a_large_folder_and_a_place_that_takes_no_file_are_one_line(
    full: Detector, tmp_path: Path
) -> None:
    full.save(tmp_path / "model")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(MAX_EXPLAINED + 1):
        (images / f"{number}.png").write_bytes(b"")
    config = PredictConfig(source=str(images), model=str(tmp_path / "model"), explain=True)
    with pytest.raises(UserError, match=r"explain=true: 201 images, and at most 200 are explained"):
        run(config)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "x.png").write_bytes(png(0))
    there = {"source": str(tmp_path / "x.png"), "explain_to": str(tmp_path / "file" / "maps")}
    with pytest.raises(UserError, match=r"explain_to=.*/file/maps: cannot be written \("):
        list(run(config.model_copy(update=there)))
