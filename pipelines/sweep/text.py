"""A finished sweep in the terminal: what was chosen, on what, and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipelines.sweep.result import Choice, SettingValue, SweepResult, Trial

# Failed trials that are listed with their reason.
_FAILED = 3


def summary(result: SweepResult) -> RenderableType:
    """What a sweep chose of each method, by which rule, and how its trials ended."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("method + score")
    for name in ("accuracy", "AUROC", "FPR"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("chosen on validation")
    for name, choice in result.methods.items():
        _add_rows(table, name, choice)
    rule = Text(f"Chosen by: {result.criterion}.")
    return Group(table, Text(), rule, *_counts(result.trials))


def _add_rows(table: Table, name: str, choice: Choice) -> None:
    """A row with the method's setting, then one for each score; the criterion has a star."""
    table.add_row(Text(name, "bold"), "", "", "", Text(words(choice.chosen)))
    for score, params in choice.scores.items():
        figures = choice.validation.get(score)
        known = (figures.auroc, figures.fpr) if figures is not None else (None, None)
        mark = "*" if score == choice.setting.score else " "
        cells = [_percent(value) for value in (choice.accuracy, *known)]
        table.add_row(Text(f"{mark} {score}"), *cells, Text(words(params) or "-"))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _counts(trials: Sequence[Trial]) -> Iterator[RenderableType]:
    """How many trials there were, and the first that failed with their reasons."""
    failed = [trial for trial in trials if trial.status == "failed"]
    stopped = sum(trial.status == "stopped" for trial in trials)
    counts = f"{len(trials)} trials, {stopped} stopped early, {len(failed)} failed"
    yield Text(counts + (":" if failed else "."))
    for trial in failed[:_FAILED]:
        said = f"{trial.method} {words(trial.settings)}: {trial.reason}"
        yield Padding(Text(said), (0, 0, 0, 2))
    if len(failed) > _FAILED:
        yield Padding(Text(f"and {len(failed) - _FAILED} more in sweep.json"), (0, 0, 0, 2))


def words(values: Mapping[str, SettingValue] | Mapping[str, int | float]) -> str:
    """Values as the words of a command line."""
    return ", ".join(f"{key}={'null' if v is None else v}" for key, v in values.items())
