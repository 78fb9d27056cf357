"""The pictures of the report state the numbers of the scores."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pipelines import plots
from pipelines.report import figures as pictures
from pipelines.report import page as report
from pipelines.report.figures import ScoredMethod
from tests.report.example import SCORES, Example, build


@pytest.fixture(scope="module")
def evidence() -> Example:
    return build()


def drawn_texts(figure: Any) -> list[str]:
    root = ElementTree.fromstring(plots.svg(figure, "title"))
    return ["".join(text.itertext()) for text in root.iter() if text.tag.endswith("text")]


def scored(evidence: Example, method: str) -> ScoredMethod:
    methods = report.scored_methods(evidence.metrics, evidence.inputs.scores)
    return next(item for item in methods if item.method == method)


def test_roc_panels_state_the_area_of_all_pairs(evidence):
    item = scored(evidence, "coop")
    rows = item.table.to_pylist()
    texts = drawn_texts(pictures.roc(item, "near", 0.95))

    for score in SCORES:
        known = np.array([r[f"score_{score}"] for r in rows if r["set"] == "test"])
        unknown = np.array([r[f"score_{score}"] for r in rows if r["set"].startswith("ood/near/")])
        assert f"{score}  {100 * (known[:, None] > unknown).mean():.1f}" in texts


def test_histograms_state_the_share_accepted_of_each_kind(evidence):
    item = scored(evidence, "ebm")
    rows = item.table.to_pylist()
    texts = drawn_texts(pictures.histogram(item))

    for name, prefix in {"ID": "test", "shifted": "shifted/", "near": "ood/near/"}.items():
        scores = [r["score_delta_energy"] for r in rows if r["set"].startswith(prefix)]
        assert name in texts
        assert f"{100 * np.mean(np.array(scores) >= item.threshold):.1f} %" in texts


def test_figures_are_png_equal_each_time_and_leave_matplotlib_as_it_was(evidence):
    before = dict(matplotlib.rcParams)
    arguments = evidence.metrics, evidence.inputs.scores
    first = report.figures(*arguments)

    assert first == report.figures(*arguments)
    assert set(first) == {"table.png", "histograms.png", "accuracy_detection.png"}
    assert all(Image.open(io.BytesIO(content)).format == "PNG" for content in first.values())
    assert dict(matplotlib.rcParams) == before


def test_a_heat_map_is_the_image_in_grey_under_the_colours_of_its_places():
    crop = np.zeros((20, 40, 3), np.uint8)
    crop[:, 20:] = (255, 255, 255)
    values = np.array([[0.0, 1.0], [1.0, 0.0]])
    picture = np.asarray(plots.heat_map(crop, values, side=100), dtype=int)
    viridis = (np.array(matplotlib.colormaps["viridis"]([0.0, 1.0]))[:, :3] * 255).round()
    assert picture.shape == (100, 200, 3)
    for row, column, colour, grey in ((25, 50, 0, 0), (25, 150, 1, 255), (75, 50, 1, 0)):
        expected = (viridis[colour] + grey) / 2
        assert np.abs(picture[row, column] - expected).max() <= 1
    even = np.asarray(plots.heat_map(crop, np.ones((2, 2)), side=100), dtype=int)
    assert (even[:, :90] == even[0, 0]).all()
