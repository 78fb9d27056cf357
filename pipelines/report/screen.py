"""The end of a run on one screen: the champion, one small table, the next commands.

A terminal draws it in colour; elsewhere it is plain text of the same words.

    rich.print(screen.summary(metrics, champion, [("one image", "python -m jobs.predict ...")]))
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.evaluate.metrics import MEAN, MetricRow, Metrics, Spread
from pipelines.register.result import RegisterResult
from pipelines.report.tables import fpr_name, set_label

# Lines and columns that the screen never exceeds.
LINES, WIDTH = 40, 100
# Rows of the table; the others are in the report.
_ROWS = 20
_NAME_WIDTH = 28


def summary(
    metrics: Metrics, champion: RegisterResult, commands: Sequence[tuple[str, str]]
) -> RenderableType:
    """The last screen of a run.

    Args:
        metrics: of the run.
        champion: what was registered.
        commands: what to do next: a title and a command, a line each.
    """
    return Group(
        _champion(metrics, champion),
        Text(),
        _table(metrics, champion),
        *_left_out(metrics),
        Text(),
        _commands(commands),
    )


def _champion(metrics: Metrics, champion: RegisterResult) -> RenderableType:
    row = metrics.row(champion.method, champion.score)
    figures = [f"ID accuracy {_percent(row.id_accuracy)} %"]
    if row.ood_accuracy is not None:
        figures.append(f"accuracy under shift {_percent(row.ood_accuracy)} %")
    if MEAN in row.auroc:
        figures.append(f"AUROC {_percent(row.auroc[MEAN])} %")
        figures.append(f"{fpr_name(metrics)} {_percent(row.fpr[MEAN])} %")
    title = Text.assemble(
        ("champion  ", "bold"), (_short(f"{champion.method} + {champion.score}", 60), "bold green")
    )
    title.append(f", version {champion.model_version}")
    return Group(title, Text("  " + ", ".join(figures)), *map(Text, _threshold(row, metrics)))


def _threshold(row: MetricRow, metrics: Metrics) -> list[str]:
    """What the champion's threshold does to ID and to shifted images."""
    target = row.threshold.meant_for(metrics.target_tpr)
    accepted = f"  {_percent(row.tpr['test'])} % of ID test images"
    shifted = {name: share for name, share in row.tpr.items() if name in row.shifted}
    if shifted:
        mean = 100 * sum(share.mean for share in shifted.values()) / len(shifted)
        accepted += f", {mean:.1f} % of shifted ones"
    if len(shifted) > 1:
        least = min(shifted, key=lambda name: shifted[name].mean)
        label = _short(set_label(least), _NAME_WIDTH)
        accepted += f"; the least of {label}: {_percent(shifted[least])} %"
    return [f"  threshold {row.threshold.value:.4g}, set on {target}, accepts", accepted]


def _table(metrics: Metrics, champion: RegisterResult) -> RenderableType:
    """Each method under its selection criterion; detection is a mean over all OOD sets."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("method", "selection score"):
        table.add_column(name, no_wrap=True, max_width=_NAME_WIDTH)
    for name in ("ID ACC", "OOD ACC", "AUROC", "FPR"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in list(metrics.methods)[:_ROWS]:
        row = metrics.criterion_row(method)
        is_champion = (row.method, row.score) == (champion.method, champion.score)
        values = (row.id_accuracy, row.ood_accuracy, row.auroc.get(MEAN), row.fpr.get(MEAN))
        table.add_row(
            _short(row.method, _NAME_WIDTH),
            _short(row.score, _NAME_WIDTH),
            *(map(_percent, values)),
            style="green" if is_champion else "",
        )
    return table


def _left_out(metrics: Metrics) -> list[Text]:
    seeds = len(metrics.seeds)
    over = f"means over {seeds} seeds and all OOD sets" if seeds > 1 else "means over all OOD sets"
    more = len(metrics.methods) - _ROWS
    note = f"percent, {over}; every score and group of sets: the report, or verbose=true"
    return [Text(f"{note}; {more} more methods there" if more > 0 else note, style="dim")]


def _commands(commands: Sequence[tuple[str, str]]) -> RenderableType:
    """One line a command, however long: one that is folded could not be copied."""
    width = max(len(title) for title, _ in commands) if commands else 0
    return Group(
        *(
            Text.assemble((f"{title:<{width}}  ", "bold"), command, no_wrap=True, overflow="ignore")
            for title, command in commands
        )
    )


def _percent(spread: Spread | None) -> str:
    return "-" if spread is None else f"{100 * spread.mean:.1f}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
