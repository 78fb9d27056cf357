"""The search over temperatures, c and gamma, against plain loops and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score, roc_curve

from pipelines.ood import SCORES
from pipelines.score import search as posthoc
from pipelines.score.config import PostHocConfig
from pipelines.score.search import Setting

SCALE = 11.5


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    raw = [math.exp(v - top) for v in values]
    return [r / sum(raw) for r in raw]


def plain_score(name: str, s: list[float], tau: float = 1.0, c: float = 1, gamma: float = 0.1):
    """One sample's score by its formula."""
    f = [v * SCALE for v in s]
    if name == "msp":
        return max(softmax([v / tau for v in f]))
    if name == "mcm":
        return max(softmax([v / tau for v in s]))
    if name == "max_logit":
        return max(f)
    if name == "energy":
        return tau * math.log(math.fsum(math.exp(v / tau) for v in f))
    if name == "neg_entropy":
        return math.fsum(p * math.log(p) for p in softmax([v / tau for v in f]))
    if name == "gen":
        return -math.fsum(p**gamma * (1 - p) ** gamma for p in softmax(f))
    assert name == "delta_energy"
    before = -math.log(math.fsum(math.exp(v / tau) for v in s))
    order = sorted(range(len(s)), key=lambda k: -s[k])
    after = [
        -math.log(1 + math.fsum(math.exp(v / tau) for k, v in enumerate(s) if k != order[j]))
        for j in range(int(c))
    ]
    return math.fsum(after) / c - before


def similarities(seed: int, rows: int, shift: float) -> NDArray[np.float32]:
    """Cosines with one class a little above the others."""
    random = np.random.default_rng(seed)
    values = random.normal(0.1, 0.08, (rows, 5))
    values[np.arange(rows), random.integers(5, size=rows)] += shift
    return values.astype(np.float32)


ID = similarities(0, 60, 0.25)
OOD = {"validation_ood/a": similarities(1, 40, 0.08), "validation_ood/b": similarities(2, 25, 0.15)}
CONFIG = PostHocConfig(budget=12, tau=(0.05, 2.0), c=[1, 2, 3], gamma=[0.1, 0.5])


@pytest.mark.parametrize("score", posthoc.USABLE)
def test_every_setting_is_judged_as_by_hand(score: str) -> None:
    found = posthoc.search(score, ID, OOD, SCALE, CONFIG)
    assert found
    for setting in found:
        known = [plain_score(score, row.tolist(), **setting.params) for row in ID]
        aurocs, fprs = [], []
        for rows in OOD.values():
            other = [plain_score(score, row.tolist(), **setting.params) for row in rows]
            truth = [1] * len(known) + [0] * len(other)
            aurocs.append(roc_auc_score(truth, known + other))
            fpr, tpr, _ = roc_curve(truth, known + other, drop_intermediate=False)
            fprs.append(fpr[np.argmax(tpr >= 0.95)])
        assert setting.auroc == pytest.approx(np.mean(aurocs), abs=1e-9)
        assert setting.fpr == pytest.approx(np.mean(fprs), abs=1e-9)


@pytest.mark.parametrize("score", posthoc.USABLE)
def test_scores_are_the_formulas_in_float64(score: str) -> None:
    params = posthoc.settings(score, CONFIG, num_classes=5, logit_scale=SCALE)[-1]
    found = posthoc.scores_of(score, ID, SCALE, params)
    expected = [plain_score(score, row.tolist(), **params) for row in ID]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_every_score_with_a_parameter_has_the_same_budget() -> None:
    for budget in (6, 12, 24):
        config = PostHocConfig(budget=budget, c=[1, 2, 3], gamma=[0.1] * budget)
        for score in posthoc.USABLE:
            tried = posthoc.settings(score, config, num_classes=10, logit_scale=SCALE)
            searched = {"tau", "c", "gamma"} & set(SCORES[score].parameters)
            assert len(tried) == (budget if searched else 1), score
            assert all(set(params) == searched for params in tried)


def test_temperatures_are_log_spaced_and_scaled_for_logits() -> None:
    config = PostHocConfig(budget=5, tau=(0.01, 100.0))
    taus = [p["tau"] for p in posthoc.settings("mcm", config, num_classes=4, logit_scale=2.0)]
    assert taus == [0.01, 0.1, 1.0, 10.0, 100.0]
    taus = [p["tau"] for p in posthoc.settings("energy", config, num_classes=4, logit_scale=2.0)]
    assert taus == [0.02, 0.2, 2.0, 20.0, 200.0]


def test_c_is_never_more_than_the_classes() -> None:
    tried = posthoc.settings("delta_energy", CONFIG, num_classes=2, logit_scale=1.0)
    assert {p["c"] for p in tried} == {1, 2}
    config = PostHocConfig(c=[3, 4])
    tried = posthoc.settings("delta_energy", config, num_classes=2, logit_scale=1.0)
    assert {p["c"] for p in tried} == {1}


def test_the_best_setting() -> None:
    found = [
        Setting({"n": 0}, 0.8, 0.1),
        Setting({"n": 1}, 0.9, 0.3),
        Setting({"n": 2}, 0.9, 0.2),
        Setting({"n": 3}, 0.9, 0.2),
    ]
    assert posthoc.best(found).params == {"n": 2}


def test_sets_count_equally_whatever_their_size() -> None:
    far = np.repeat(similarities(3, 1, 0.0) - 1, 500, axis=0)
    found = posthoc.search("max_logit", ID, {"a": far, "b": ID[:10]}, SCALE, CONFIG)
    alone = posthoc.search("max_logit", ID, {"b": ID[:10]}, SCALE, CONFIG)
    assert found[0].auroc == pytest.approx((1 + alone[0].auroc) / 2)


@pytest.mark.parametrize("tau", [(1.0, 0.5), (0.0, 1.0), (1.0, 1.0), (0.1, math.inf)])
def test_impossible_temperatures(tau: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match=r"0 < from < to|finite number"):
        PostHocConfig(tau=tau)
