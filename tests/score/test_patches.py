"""Maps of places under a head, against its own scores and loops over places."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.heads import Predictor
from pipelines.score.judge import judge
from pipelines.score.patches import grid, patch_maps, why_no_map

DIM = 8


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    x = random.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


RANDOM = np.random.default_rng(0)
TEXT = unit(RANDOM, 4, DIM)
FEATURES, LOCAL = unit(RANDOM, 3, DIM), unit(RANDOM, 3, 6, DIM)
CROPS = [np.full((40, 60, 3), 50 * n, np.uint8) for n in range(3)]


def head(name: str = "zero_shot") -> Predictor:
    arrays, settings = {"text_features": TEXT}, {}
    if name == "gallop":
        random = np.random.default_rng(1)
        arrays |= {
            "local_text_features": unit(random, 2, 4, DIM),
            "projection": unit(random, DIM, DIM),
        }
        settings = {"scales": [0.3, 0.6]}
    return Predictor(name, arrays, settings, 10.0, ("p", "q", "r", "s"))


@pytest.mark.parametrize("name", ["zero_shot", "gallop"])
def test_a_map_holds_what_gl_mcm_takes_its_maximum_over(name: str) -> None:
    params = {"tau": 0.3, "weight": 0.7}
    maps = patch_maps(head(name), "gl_mcm", params, LOCAL, CROPS)
    whole = judge(head(), {"mcm": {"tau": 0.3}}, FEATURES)["score_mcm"]
    judged = judge(head(name), {"gl_mcm": params}, FEATURES, local=LOCAL)["score_gl_mcm"]
    for one, own, score, crop in zip(maps, whole, judged, CROPS, strict=True):
        assert one.score == "mcm"
        assert one.values.shape == (2, 3)  # 6 places of an image that is wider than high
        assert one.crop is crop
        assert own + 0.7 * one.values.max() == score


def test_the_places_go_row_by_row_and_have_the_models_own_score() -> None:
    (one,) = patch_maps(head(), "energy", {"tau": 2.0}, LOCAL[:1], CROPS[:1])
    for place in range(6):
        cosines = TEXT.astype(np.float64) @ LOCAL[0, place].astype(np.float64)
        by_hand = 2.0 * math.log(sum(math.exp(10.0 * s / 2.0) for s in cosines))
        assert one.values[place // 3, place % 3] == pytest.approx(by_hand, abs=1e-5)
    low, high = one.values.min(), one.values.max()
    assert one.caption == f"energy of 2 x 3 patches, {low:.4g} to {high:.4g}"


@pytest.mark.parametrize(
    ("score", "params"), [("knn", {"k": 5}), ("neg_label", {"tau": 0.01}), ("energy+mcm", {})]
)
def test_a_score_that_no_patch_has_is_drawn_as_mcm(score: str, params: dict[str, float]) -> None:
    found = patch_maps(head(), score, params, LOCAL, CROPS)
    expected = patch_maps(head(), "mcm", {}, LOCAL, CROPS)
    for one, other in zip(found, expected, strict=True):
        assert one.score == "mcm"
        np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize(
    ("places", "size", "shape"),
    [
        (196, (224, 224), (14, 14)),
        (4, (64, 64), (2, 2)),
        (1, (32, 32), (1, 1)),
        (8, (64, 128), (2, 4)),
        (8, (128, 64), (4, 2)),
    ],
)
def test_a_grid_has_the_proportions_of_the_image(
    places: int, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert grid(places, size) == shape


def test_places_that_fill_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="7 places fill no grid of an image of 64 x 64"):
        grid(7, (64, 64))


def test_heads_without_text_and_single_places_have_no_map() -> None:
    classifier = Predictor("classifier", {}, {}, 1.0, ("p",))
    assert why_no_map(classifier, lambda: 4) == "head classifier compares no feature with text"
    assert "one local feature" in str(why_no_map(head(), lambda: 1))
    assert why_no_map(head(), lambda: 4) is None
