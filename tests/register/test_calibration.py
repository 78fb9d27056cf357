"""The confidence and the p-values of a registered model; no other number changes by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import UserError
from pipelines.heads import Predictor
from pipelines.register.calibration import Calibration
from pipelines.register.detector import Detector

NAMES = ("a", "b", "c", "d")


def overconfident(factor: float) -> tuple[Predictor, list[tuple]]:
    """A linear rule whose logits are `factor` times those that the labels follow."""
    random = np.random.default_rng(0)
    weight = (3 * random.normal(size=(4, 8))).astype(np.float32)
    arrays = {"weight": factor * weight, "bias": np.zeros(4, np.float32)}
    sides = []
    for number in (3000, 3000):
        features = random.normal(size=(number, 8)).astype(np.float32)
        logits = features @ weight.T
        labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
        sides.append((features, None, labels))
    return Predictor("classifier", arrays, {}, 1.0, NAMES), sides


def test_a_confidence_that_is_too_high_comes_down_to_the_accuracy() -> None:
    predictor, sides = overconfident(4.0)
    found = Calibration.of(predictor, *sides)
    assert found.temperature == pytest.approx(4.0, rel=0.1)
    assert found.before is not None
    assert found.after is not None
    assert found.before > 0.05 > 0.03 > found.after
    assert float(found.tags["calibration_error"]) == pytest.approx(found.after, rel=1e-5)
    assert Calibration().tags == {}


def test_the_saved_model_has_it_and_judges_as_before(tmp_path) -> None:
    predictor, (_, (features, _, labels)) = overconfident(4.0)
    plain = Detector(predictor, None, "energy", {}, 1.0)
    Detector(predictor, None, "energy", {}, 1.0, temperature=4.0).save(tmp_path / "cool")
    cool = Detector.load(tmp_path / "cool")
    one, other = plain.judge_features(features), cool.judge_features(features)
    same = ["class_name", "score", "threshold", "is_ood"]
    assert other.select(same).equals(one.select(same))
    right = np.array(NAMES)[labels] == np.array(other["class_name"].to_pylist())
    assert np.mean(other["confidence"].to_numpy()) == pytest.approx(right.mean(), abs=0.02)
    assert np.mean(one["confidence"].to_numpy()) > right.mean() + 0.05


def test_the_p_value_counts_the_known_images_with_as_low_a_score(tmp_path: Path) -> None:
    predictor, ((known, _, _), (features, _, _)) = overconfident(1.0)
    plain = Detector(predictor, None, "energy", {}, 1.0)
    scores = plain.judge_features(known)["score"].to_numpy()[:500]
    replace(plain, known_scores=scores).save(tmp_path / "model")
    judged = Detector.load(tmp_path / "model").judge_features(features)
    counts = (scores[None, :] <= judged["score"].to_numpy()[:, None]).sum(axis=1)
    assert judged["p_value"].to_numpy() == pytest.approx((1 + counts) / 501, rel=1e-12)
    # Images of the same source, so P(p <= 0.1) is 0.1 but for the noise of 500 and of 3,000.
    assert np.mean(judged["p_value"].to_numpy() <= 0.1) == pytest.approx(0.1, abs=0.05)
    without = plain.judge_features(features)
    assert without["p_value"].null_count == len(features)
    assert judged.drop(["p_value"]).equals(without.drop(["p_value"]))
    assert Detector.load(tmp_path / "model").judge_features(features[:0]).num_rows == 0


def test_known_scores_that_are_not_as_saved_judge_nothing(tmp_path: Path) -> None:
    predictor, _ = overconfident(1.0)
    Detector(predictor, None, "energy", {}, 1.0, known_scores=np.arange(9.0)).save(tmp_path)
    path = tmp_path / "known-scores.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"known-scores\.safetensors.*this model judges nothing"):
        Detector.load(tmp_path)
