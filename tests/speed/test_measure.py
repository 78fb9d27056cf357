import json

import numpy as np
import pytest

from pipelines.speed import maths, measure
from pipelines.speed.measure import Row


def row(**values):
    defaults = {
        "name": "ours",
        "seconds": 1.0,
        "reference": "theirs",
        "reference_seconds": 4.0,
        "ratio": 0.25,
        "limit": 0.5,
        "note": "",
    }
    return Row(**(defaults | values))


def test_calls_are_timed_in_turns_and_the_best_of_each_is_kept(monkeypatch):
    clock = iter([0.0, 3.0, 3.0, 8.0, 8.0, 10.0, 10.0, 14.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    turns = []
    measured = measure.compare(
        "ours",
        lambda: turns.append("ours"),
        reference="theirs",
        reference_call=lambda: turns.append("theirs"),
        limit=0.4,
        repeats=2,
    )
    assert turns == ["ours", "theirs", "ours", "theirs"]
    assert (measured.seconds, measured.reference_seconds, measured.ratio) == (2.0, 4.0, 0.5)
    assert measured.holds is False


@pytest.mark.parametrize(
    ("ratio", "limit", "holds"),
    [(0.5, 0.5, True), (0.6, 0.5, False), (0.6, None, None), (None, 0.5, None)],
)
def test_a_row_holds_at_its_limit(ratio, limit, holds):
    assert row(ratio=ratio, limit=limit).holds is holds


def test_extra_memory_sees_what_a_call_allocates_and_gives_back():
    extra = measure.extra_memory(lambda: np.ones(8 * 2**20).sum())  # 64 MiB
    if extra is None:
        pytest.skip("the system does not tell the peak of its memory")
    assert 60 * 2**20 < extra < 80 * 2**20


def test_a_table_has_a_line_per_row_and_says_what_fails():
    rows = [row(), row(name="slow", ratio=0.75), row(seconds=None, ratio=None, limit=None)]
    lines = measure.table(rows).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[7].strip() for line in lines[2:]] == ["yes", "NO", ""]
    assert [entry["holds"] for entry in json.loads(measure.to_json(rows))] == [True, False, None]


@pytest.mark.slow
def test_the_suite_of_the_maths_runs_at_a_small_scale_and_its_results_agree():
    rows = {row.name: row for row in maths.run(scale=1e-4)}
    assert {row.limit for row in rows.values()} == {1.25, 1.2, 0.05, 0.5, 0.1, None}
    (exact,) = (row for name, row in rows.items() if "all six" in name)
    assert float(exact.note.split()[-1]) < 1e-12
    (binned,) = (row for name, row in rows.items() if name.startswith("histogram_metrics"))
    assert binned.note.endswith("within their bound: yes")
    with pytest.raises(ValueError, match="scale"):
        maths.run(scale=0)
