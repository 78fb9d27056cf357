"""The table of post-hoc surfaces has every parameter of every score."""

from __future__ import annotations

import pytest

from pipelines.score import search as posthoc
from pipelines.score.search import Setting
from pipelines.sweep import importance, surfaces
from pipelines.sweep.trial_record import Surface, TrialRecord

SETTINGS = [
    Setting({"tau": tau, "weight": weight}, 0.9 + 0.01 * tau + 0.02 * weight, 0.5)
    for tau in (1.0, 2.0)
    for weight in (0.5, 1.0, 2.0)
]


def test_the_weight_of_gl_mcm_is_there() -> None:
    record = TrialRecord(status="done", accuracy=0.9, surface={"gl_mcm": Surface.of(SETTINGS)})
    table = surfaces.table([("zero_shot", 3, record)], ("mcm", "gl_mcm"))
    assert table is not None
    rows = table.to_pylist()
    assert [(row["tau"], row["weight"]) for row in rows] == [
        (setting.params["tau"], setting.params["weight"]) for setting in SETTINGS
    ]
    assert {(row["method"], row["trial"], row["score"]) for row in rows} == {
        ("zero_shot", 3, "gl_mcm")
    }
    found = importance.of_surface(rows, surfaces.parameters(table))
    assert found is not None
    assert set(found.shares) == {"tau", "weight"}


@pytest.mark.parametrize("score", ["gen", "gl_mcm", "knn", "energy+knn", "delta_energy+gen"])
def test_every_parameter_of_every_score_is_a_column(score: str) -> None:
    names = surfaces.schema(["mcm", score]).names
    assert set(posthoc.defaults(score, num_train=9)) | {"tau"} <= set(names)
    assert names[:3] == ["method", "trial", "score"]
    assert names[-2:] == ["auroc", "fpr"]


def test_without_a_surface_there_is_no_table() -> None:
    assert surfaces.table([("coop", 0, TrialRecord(status="done"))], ("msp",)) is None
