from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError
from pipelines.heads import Predictor
from pipelines.ood import SCORES
from pipelines.register.detector import Detector
from pipelines.score.judge import judge

ROOT = Path(__file__).parents[2]
USABLE = [name for name, e in SCORES.items() if e.inputs in (("similarity",), ("logits",))]


def unit(rng: np.random.Generator, rows: int, dim: int = 24) -> np.ndarray:
    x = rng.normal(size=(rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def predictor(num_classes: int, scale: float = 11.5, dim: int = 24) -> Predictor:
    text = unit(np.random.default_rng(num_classes), num_classes, dim)
    names = tuple(f"class {k}" for k in range(num_classes))
    return Predictor("zero_shot", {"text_features": text}, {}, scale, names)


def settings(num_classes: int) -> dict[str, dict[str, float]]:
    """Every score that needs a head's similarities alone, with a temperature that is no power."""
    chosen: dict[str, dict[str, float]] = {}
    for name in USABLE:
        chosen[name] = {"tau": 0.37} if "tau" in SCORES[name].parameters else {}
    chosen["delta_energy"]["c"] = min(3, num_classes)
    return chosen


@pytest.mark.parametrize("num_classes", [2, 6, 7, 100])
def test_a_rows_result_has_the_same_bits_in_any_batch(num_classes):
    head, scores = predictor(num_classes), settings(num_classes)
    features = unit(np.random.default_rng(0), 1000)
    whole = judge(head, scores, features)
    order = np.random.default_rng(1).permutation(1000)
    shuffled = judge(head, scores, features[order])
    sevens = [judge(head, scores, features[i : i + 7]) for i in range(0, 1000, 7)]
    ones = [judge(head, scores, features[i : i + 1]) for i in range(0, 1000, 11)]
    assert set(whole) == {"predicted", "confidence", *(f"score_{name}" for name in scores)}
    for column, values in whole.items():
        np.testing.assert_array_equal(shuffled[column], values[order], column)
        np.testing.assert_array_equal(np.concatenate([j[column] for j in sevens]), values, column)
        np.testing.assert_array_equal(np.concatenate([j[column] for j in ones]), values[::11])


def test_many_classes_keep_the_bits_too():
    head, scores = predictor(1500), {"delta_energy": {"tau": 0.05, "c": 2}, "mcm": {"tau": 0.3}}
    features = unit(np.random.default_rng(0), 40)
    whole, backwards = judge(head, scores, features), judge(head, scores, features[::-1].copy())
    for column, values in whole.items():
        np.testing.assert_array_equal(backwards[column][::-1], values, column)


def test_a_fresh_process_with_other_threads_and_order_gives_the_same_bits(tmp_path):
    head, features = predictor(7), unit(np.random.default_rng(5), 600)
    head.save(tmp_path)
    np.save(tmp_path / "features.npy", features)
    code = f"""
import sys; from pathlib import Path; import numpy as np
from pipelines.score.judge import judge
from pipelines.heads import Predictor
folder = Path(sys.argv[1])
features = np.load(folder / "features.npy")[::-1].copy()
judged = judge(Predictor.load(folder), {settings(7)!r}, features)
np.savez(folder / "judged.npz", **judged)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    here = judge(head, settings(7), features)
    there = np.load(tmp_path / "judged.npz")
    assert set(there.files) == set(here)
    for column, values in here.items():
        np.testing.assert_array_equal(there[column][::-1], values, column)


def test_judge_gives_the_formulas_values_in_float64():
    head, features = predictor(5), unit(np.random.default_rng(2), 50)
    text = head.arrays["text_features"].astype(np.float64)
    s = (features.astype(np.float64) @ text.T).astype(np.float32).astype(np.float64)
    f = s * 11.5
    softmax = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
    at_02 = np.exp(s / 0.2)
    ordered = np.sort(s, axis=1)
    e0 = -np.log(at_02.sum(axis=1))
    e1 = -np.mean(
        [np.log(1 + at_02.sum(axis=1) - np.exp(ordered[:, -j] / 0.2)) for j in (1, 2)], axis=0
    )
    judged = judge(
        head,
        {"mcm": {"tau": 0.2}, "energy": {"tau": 2.0}, "delta_energy": {"tau": 0.2, "c": 2}},
        features,
    )
    assert judged["predicted"].dtype == np.int64
    np.testing.assert_array_equal(judged["predicted"], s.argmax(axis=1))
    near = {"rtol": 1e-12, "atol": 0}
    np.testing.assert_allclose(judged["confidence"], softmax.max(axis=1), **near)
    np.testing.assert_allclose(
        judged["score_mcm"], (at_02 / at_02.sum(axis=1, keepdims=True)).max(axis=1), **near
    )
    np.testing.assert_allclose(
        judged["score_energy"], 2 * np.log(np.exp(f / 2).sum(axis=1)), **near
    )
    np.testing.assert_allclose(judged["score_delta_energy"], e1 - e0, rtol=1e-9)


def test_no_rows_give_empty_columns():
    judged = judge(predictor(3), {"mcm": {}}, np.empty((0, 24), np.float32))
    assert {column: values.shape for column, values in judged.items()} == {
        "predicted": (0,),
        "confidence": (0,),
        "score_mcm": (0,),
    }


def test_features_that_are_not_unit_vectors_are_refused():
    features = unit(np.random.default_rng(0), 10)
    features[3] *= 2
    features[7, 0] = np.nan
    with pytest.raises(ValueError, match=r"2 of 10 rows have not, the first is row 3 .* length 2"):
        judge(predictor(3), {"mcm": {}}, features)
    with pytest.raises(ValueError, match=r"matrix \(N, D\), came shape \(24,\)"):
        judge(predictor(3), {"mcm": {}}, features[0])


def test_a_score_at_the_threshold_is_not_ood():
    head, features = predictor(4), unit(np.random.default_rng(3), 30)
    scores = judge(head, {"mcm": {"tau": 0.5}}, features)["score_mcm"]
    threshold = float(np.sort(scores)[10])
    detector = Detector(head, None, "mcm", {"tau": 0.5}, threshold)
    verdicts = detector.judge_features(features)
    assert verdicts["is_ood"].to_pylist() == (scores < threshold).tolist()
    assert sum(verdicts["is_ood"].to_pylist()) == 10
    assert verdicts["score"].to_pylist() == scores.tolist()
    assert set(verdicts["threshold"].to_pylist()) == {threshold}
    names = [head.class_names[k] for k in judge(head, {}, features)["predicted"]]
    assert verdicts["class_name"].to_pylist() == names
    assert verdicts["error"].null_count == 30


@pytest.fixture(scope="module")
def backbone(backbone_files):
    config, weights = backbone_files["resnet"]
    return BackboneConfig(name="small", config=str(config), path=str(weights))


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_images_get_the_verdict_of_their_features_and_bad_ones_an_error(backbone):
    contents = [png(0), b"rubbish", png(1), FileNotFoundError("gone.png"), png(2)]
    detector = Detector(predictor(4, dim=16), backbone, "energy", {"tau": 1.0}, 1.2, batch_size=2)
    verdicts = detector.judge_images(contents).to_pylist()
    loaded = network.load(backbone)
    pixels = [loaded.preprocess(Image.open(io.BytesIO(png(seed)))) for seed in range(3)]
    features = np.concatenate([loaded.encode_image(p[None]).numpy() for p in pixels])
    wanted = detector.judge_features(features).to_pylist()
    good = [verdicts[place] for place in (0, 2, 4)]
    assert [v["class_name"] for v in good] == [w["class_name"] for w in wanted]
    assert [v["score"] for v in good] == pytest.approx([w["score"] for w in wanted], rel=1e-5)
    assert verdicts[1]["error"].startswith("not_an_image: 7 bytes")
    assert verdicts[3]["error"] == "missing: FileNotFoundError: gone.png"
    for bad in (verdicts[1], verdicts[3]):
        assert [bad[k] for k in ("class_name", "score", "is_ood", "confidence")] == [None] * 4
        assert bad["threshold"] == 1.2


def test_a_saved_detector_needs_nothing_but_its_folder(backbone, tmp_path):
    copies = {key: tmp_path / Path(getattr(backbone, key)).name for key in ("config", "path")}
    for key, copy in copies.items():
        shutil.copyfile(getattr(backbone, key), copy)
    here = backbone.model_copy(update={key: str(copy) for key, copy in copies.items()})
    detector = Detector(
        predictor(4, dim=16), here, "delta_energy", {"tau": 0.1, "c": 2}, 0.3, facts={"method": "x"}
    )
    wanted = detector.judge_images([png(0), png(1)])
    detector.save(tmp_path / "saved")
    for copy in copies.values():
        copy.unlink()
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    loaded = Detector.load(tmp_path / "moved")
    assert loaded.judge_images([png(0), png(1)]).equals(wanted)
    assert (loaded.params, loaded.threshold, loaded.facts) == (
        {"tau": 0.1, "c": 2},
        0.3,
        {"method": "x"},
    )


def test_a_detector_without_a_backbone_says_so(tmp_path):
    Detector(predictor(4), None, "mcm", {}, 0.3).save(tmp_path)
    with pytest.raises(UserError, match="without a backbone"):
        Detector.load(tmp_path).judge_images([png(0)])
    with pytest.raises(UserError, match="no detector there"):
        Detector.load(tmp_path / "elsewhere")
