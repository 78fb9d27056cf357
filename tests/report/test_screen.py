"""A run's last screen: what it says, and that it fits, in a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pipelines.evaluate.metrics import Metrics
from pipelines.register.result import RegisterResult
from pipelines.report import screen
from tests.report.example import Example, build

COMMANDS = [
    ("report", "open outputs/runs/0123456789ab/report.html"),
    ("MLflow", f"mlflow ui --backend-store-uri sqlite:////{'folder/' * 14}mlflow.db"),
    ("one image", "python -m jobs.predict source=PATH storage=./outputs"),
]


@pytest.fixture(scope="module")
def evidence() -> Example:
    return build()


def champion(metrics: Metrics, method: str = "ebm", score: str = "energy") -> RegisterResult:
    row = metrics.row(method, score)
    return RegisterResult(
        name="energy-ood", model_version="3", uri="models:/energy-ood@champion", method=method,
        score=score, params=row.params, threshold=row.threshold, content="",
    )  # fmt: skip


def drawn(metrics: Metrics, chosen: RegisterResult, *, terminal: bool = False) -> str:
    file = io.StringIO()
    colours = "truecolor" if terminal else "auto"
    console = Console(file=file, width=screen.WIDTH, force_terminal=terminal, color_system=colours)
    console.print(screen.summary(metrics, chosen, COMMANDS))
    return file.getvalue()


def check_size(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_it_says_what_the_champion_does(evidence: Example) -> None:
    metrics = evidence.metrics
    text = " ".join(drawn(metrics, champion(metrics)).split())
    row = metrics.row("ebm", "energy")
    assert row.ood_accuracy is not None
    assert "champion ebm + energy, version 3" in text
    for said, value in {
        "ID accuracy": row.id_accuracy,
        "accuracy under shift": row.ood_accuracy,
        "AUROC": row.auroc["mean"],
        "FPR at 95 % TPR": row.fpr["mean"],
    }.items():
        assert f"{said} {100 * value.mean:.1f} %" in text
    shares = [row.tpr[name].mean for name in row.shifted]
    assert f"accepts {100 * row.tpr['test'].mean:.1f} % of ID test images, " in text
    assert f"{100 * sum(shares) / 2:.1f} % of shifted ones; the least of blurred: " in text
    assert f"the least of blurred: {100 * min(shares):.1f} %" in text
    for title, command in COMMANDS:
        assert title in text
        assert command.split()[0] in text


def test_one_small_table_has_each_method_under_its_criterion(evidence: Example) -> None:
    metrics = evidence.metrics
    lines = drawn(metrics, champion(metrics)).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("method"))
    assert lines[start].split() == [
        "method", "selection", "score", "ID", "ACC", "OOD", "ACC", "AUROC", "FPR",
    ]  # fmt: skip
    for line, (method, score) in zip(
        lines[start + 1 :], [("coop", "mcm"), ("ebm", "delta_energy")], strict=False
    ):
        row = metrics.row(method, score)
        values = (row.id_accuracy, row.ood_accuracy, row.auroc["mean"], row.fpr["mean"])
        numbers = [f"{100 * value.mean:.1f}" for value in values if value is not None]
        assert line.split() == [method, score, *numbers]


def test_it_fits_and_is_plain_text_where_there_is_no_terminal(evidence: Example) -> None:
    chosen = champion(evidence.metrics)
    plain, coloured = (drawn(evidence.metrics, chosen, terminal=t) for t in (False, True))
    check_size(plain)
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_fifty_methods_of_long_names_fit_too(evidence: Example) -> None:
    row = evidence.metrics.row("ebm", "energy")
    names = [f"method_{n:02d}_{'with_a_long_name' * 4}" for n in range(50)]
    shares = {name.ljust(90, "x"): share for name, share in row.tpr.items() if name != "test"}
    tpr = {**shares, "test": row.tpr["test"]}
    changes = {"score": "+".join(["energy_correction"] * 4), "tpr": tpr, "shifted": shares}
    rows = [row.model_copy(update={**changes, "method": name}) for name in names]
    metrics = evidence.but(rows=tuple(rows))
    text = drawn(metrics, champion(metrics, names[7], rows[7].score))
    check_size(text)
    assert "30 more methods there" in " ".join(text.split())


@pytest.mark.parametrize("without", ["shifted", "ood/"])
def test_what_a_benchmark_lacks_is_left_out(without: str) -> None:
    metrics = build(without=without).metrics
    text = drawn(metrics, champion(metrics))
    check_size(text)
    assert ("accuracy under shift" in text) == (without != "shifted")
    assert ("AUROC " in text.split("threshold")[0]) == (without != "ood/")
    assert " - " in " ".join(text.split())
