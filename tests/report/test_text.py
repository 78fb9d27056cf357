"""The text table for the terminal and the Markdown table have the numbers of the metrics."""

from __future__ import annotations

import re

import pytest

from pipelines.evaluate.metrics import Spread
from pipelines.report.text import markdown_table, text_table
from tests.report.example import LABELS, METHODS, SCORES, Example, build, numbers_of


@pytest.fixture(scope="module")
def evidence() -> Example:
    return build()


def test_the_text_table_has_the_numbers_in_columns_that_end_together(evidence):
    text = text_table(evidence.metrics)
    lines = text.split("\n\n")[0].splitlines()
    rows = [line for line in lines if "(" in line]

    for line, row in zip(rows, evidence.metrics.rows, strict=True):
        assert re.split(r"\s{2,}", line)[-8:] == numbers_of(row)
        assert line.startswith("* ") == ((row.method, row.score) in LABELS)
    ends = [[match.end() for match in re.finditer(r"\S+ \([\d.]+\)", line)] for line in rows]
    assert all(each == ends[0] for each in ends)
    assert [lines[0].index(head) + len(head) for head in ("AUROC", "FPR at 95 % TPR")] == [
        ends[0][4], ends[0][7]
    ]  # fmt: skip
    assert max(map(len, text.splitlines())) <= 110
    assert "* ebm + delta_energy: Zhu 2025: EBM + DeltaEnergy" in text
    assert "delta_energy tau=0.1, c=2" in text
    assert "Training gained 1.0 points & the score 2.0." in text


def test_the_text_says_who_beats_whom_and_what_happens_to_shifted_images(evidence):
    metrics = evidence.metrics
    text = " ".join(text_table(metrics).split())

    for entry in metrics.comparisons:
        if (entry.metric, entry.group) == ("auroc", "mean"):
            difference = entry.difference
            low, high = 100 * difference.low, 100 * difference.high
            word = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
            points = f"{100 * difference.value:+.1f} [{low:+.1f}, {high:+.1f}]"
            assert f"{entry.second} {points} {word}" in text
    for row in metrics.rows:
        shifted = [s.mean for name, s in row.tpr.items() if name != "test"]
        if row.label:
            said = text.split(f"Accepted as ID by {row.method} + {row.score} (%): ")[1]
            assert all(f" {100 * share:.1f}" in said for share in shifted)


@pytest.mark.parametrize(
    ("groups", "note"),
    [
        (3, "Standard deviations left out for width."),
        (9, "Groups left out for width: g0, g1, g2, g3, g4, g5, g6, g7, g8."),
    ],
)
def test_a_wide_text_table_says_what_it_leaves_out(evidence, groups, note):
    rows = []
    for row in evidence.metrics.rows:
        more = {f"g{i}": Spread(mean=0.1 * i, std=0.0) for i in range(groups)}
        figures = {"auroc": row.auroc, "fpr": row.fpr}
        wide = {name: {**more, "mean": found["mean"]} for name, found in figures.items()}
        rows.append(row.model_copy(update=wide))
    text = text_table(evidence.but(rows=tuple(rows)))

    assert max(map(len, text.splitlines())) <= 110
    assert note in " ".join(text.split())
    assert f"{100 * rows[0].fpr['mean'].mean:.1f}" in text


def test_the_markdown_table_has_the_same_numbers(evidence):
    text = markdown_table(evidence.metrics)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip(" *") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]

    assert {len(row) for row in cells} == {11}
    assert [row[3:] for row in cells[2:]] == [numbers_of(r) for r in evidence.metrics.rows]
    assert "\\<stored\\> split" in text
    assert [("**" in line) for line in lines[2:]] == [
        (m, s) in LABELS for m in METHODS for s in SCORES
    ]


def test_the_head_of_a_narrow_group_of_columns_is_not_cut(evidence):
    def only_mean(row):
        return {name: {"mean": getattr(row, name)["mean"]} for name in ("auroc", "fpr")}

    rows = tuple(r.model_copy(update=only_mean(r)) for r in evidence.metrics.rows)
    text = text_table(evidence.metrics.model_copy(update={"rows": rows}))
    heads, columns, *_ = text.splitlines()
    assert heads.endswith("FPR at 95 % TPR")
    assert columns.endswith("mean")
    assert len(heads) == len(columns)
