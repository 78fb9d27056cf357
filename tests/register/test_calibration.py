"""The confidence of a registered model: as sure as it is right, with no other number changed."""

from __future__ import annotations

import numpy as np
import pytest

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
