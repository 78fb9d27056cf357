"""What the terminal says of a finished sweep."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

from pipelines.sweep import text
from tests.sweep_record import failed, record, result


def written(found: RenderableType, width: int = 110) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(found)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_row_for_each_score_and_a_star_at_the_selection_criterion() -> None:
    sweep, _ = record()
    lines = written(text.summary(sweep))
    assert lines[0].split() == ["method", "+", "score", "accuracy", "AUROC", "FPR",
                                "chosen", "on", "validation"]  # fmt: skip
    assert lines[1].split() == ["coop", "training.lr=0.1,", "training.epochs=30"]
    best = sweep.methods["coop"].validation["mcm"]
    figures = [f"{100 * value:.1f}" for value in (best.auroc, best.fpr)]
    starred = [line.split() for line in lines if line.startswith("*")]
    assert starred[0][:2] == ["*", "mcm"]
    assert starred[0][3:] == [*figures, "tau=5.0"]
    assert [row[1] for row in starred] == ["mcm", "delta_energy"]
    assert "69 trials, 1 stopped early, 2 failed:" in lines
    assert all("\x1b" not in line for line in lines)


def test_many_failures_are_counted() -> None:
    sweep, _ = record()
    trials = [failed("coop", n, {"keep": n}, f"reason {n}") for n in range(5)]
    lines = written(text.summary(result(sweep.methods, trials)), width=80)
    assert "  coop keep=0: reason 0" in lines
    assert lines[-1] == "  and 2 more in sweep.json"
    assert max(map(len, lines)) <= 80
