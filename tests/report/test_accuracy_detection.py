"""The accuracy-against-detection picture: its front, its labels, its marks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from pipelines.ood.pareto import pareto_front
from pipelines.report.accuracy_detection import Point, accuracy_detection, pareto_front
from pipelines.report.tables import Value


def points(places: Sequence[tuple[float, float]]) -> list[Point]:
    return [
        Point(f"method {n}", "energy", Value(x / 100, 0.01), Value(y / 100, None))
        for n, (x, y) in enumerate(places)
    ]


def labels(figure: Figure) -> list[Annotation]:
    (axes,) = figure.axes
    return [text for text in axes.texts if isinstance(text, Annotation)]


@pytest.mark.parametrize(
    ("places", "front"),
    [
        ([(50, 50)], [0]),
        ([(50, 60), (60, 50), (40, 40), (55, 49)], [0, 1]),
        ([(60, 50), (50, 60), (55, 55)], [1, 2, 0]),  # by accuracy
        ([(50, 50), (50, 60), (60, 60)], [2]),  # equal in one, beaten in the other
        ([(50, 50), (50, 50), (40, 50)], [0, 1]),  # equal points stay both
    ],
)
def test_the_front_is_what_nothing_beats(
    places: list[tuple[float, float]], front: list[int]
) -> None:
    given = points(places)
    assert [p.method for p in pareto_front(given)] == [f"method {n}" for n in front]


def test_the_front_is_drawn_as_steps_from_edge_to_edge() -> None:
    figure = accuracy_detection(points([(50, 60), (60, 50), (40, 40)]), [], "ID ACC (%)")
    (axes,) = figure.axes
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-pre"]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert x[1:3] == pytest.approx([50, 60])
    assert y[1:3] == pytest.approx([60, 50])
    assert (x[0], y[0]) == pytest.approx((axes.get_xlim()[0], 60))
    assert (x[-1], y[-1]) == pytest.approx((60, axes.get_ylim()[0]))
    bold = {t.get_text() for t in labels(figure) if t.get_fontweight() == "bold"}
    assert bold == {"method 0 + energy", "method 1 + energy"}


@pytest.mark.parametrize("places", ["spread", "equal", "close"])
def test_twenty_methods_have_labels_that_do_not_overlap(places: str) -> None:
    rng = random.Random(1)
    width = {"spread": 40.0, "equal": 0.0, "close": 0.5}[places]
    own = points([(40 + width * rng.random(), 50 + width * rng.random()) for _ in range(20)])
    figure = accuracy_detection(own, own[:3], "OOD ACC (%)")
    figure.draw_without_rendering()
    found = labels(figure)
    assert sorted(t.get_text() for t in found) == sorted(f"{p.method} + energy" for p in own)
    (axes,) = figure.axes
    frame, page = axes.get_window_extent(), figure.bbox
    texts = [Text.get_window_extent(t) for t in found]  # without the lines to the points
    for a, b in itertools.combinations(texts, 2):
        assert not a.overlaps(b)
    for box in texts:
        assert box.x0 > frame.x1  # beside the axes, so over no point
        assert box.x1 <= page.x1


def test_other_scores_are_small_and_unlabelled() -> None:
    own, others = points([(50, 60), (60, 50)]), points([(50, 55), (60, 40), (60, 45)])
    figure = accuracy_detection(own, others, "ID ACC (%)")
    (axes,) = figure.axes
    small = [line for line in axes.lines if 0 < line.get_markersize() < 4 and len(line.get_xdata())]
    assert any(list(line.get_ydata()) == pytest.approx([55, 40, 45]) for line in small)
    assert len(labels(figure)) == 2
