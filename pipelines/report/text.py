"""The main table as plain text for a terminal and as Markdown for docs, with what it says."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pipelines import plots
from pipelines.evaluate.metrics import MEAN, Metrics
from pipelines.plots import escape_markdown
from pipelines.report.statements import statements
from pipelines.report.tables import Row, Table, aligned, groups, main_columns, shown, table

TEXT_WIDTH = 110


def text_table(metrics: Metrics) -> str:
    """The main table for a terminal: grouped per method, aligned, at most `TEXT_WIDTH` wide.

    Where it would be wider, the gaps, then the standard deviations, then the single groups
    are left out, and a line says so.
    """
    whole = table(metrics, main_columns(metrics))
    narrow = table(metrics, [c for c in whole.columns if c.name == MEAN or not c.group])
    tries = [(whole, True, 2), (whole, True, 1), (whole, False, 2), (narrow, True, 2)]
    for candidate, with_std, gap in tries:
        lines = _text_lines(candidate, with_std, gap)
        if max(map(len, lines)) <= TEXT_WIDTH:
            break
    under = [f"* {row.method} + {row.score}: {row.label}" for row in whole.rows if row.label]
    under += _left_out(metrics, candidate is narrow, with_std)
    under += [_chosen(name, rows) for name, rows in whole.methods]
    under += statements(metrics)
    wrapped = [textwrap.fill(line, TEXT_WIDTH, subsequent_indent="  ") for line in under if line]
    return "\n".join([*lines, "", *wrapped])


def markdown_table(metrics: Metrics) -> str:
    """The main table as Markdown, numbers right-aligned, marked rows in bold."""
    whole = table(metrics, main_columns(metrics))
    header = ["method", "score", "chosen", *(f"{c.group} {c.name}".strip() for c in whole.columns)]
    text = plots.markdown_table(header, map(_markdown_cells, whole.rows), num_texts=3)
    marked = [f"Bold: {r.method} + {r.score}: {r.label}." for r in whole.rows if r.label]
    under = [escape_markdown(line) + "  " for line in (*marked, *statements(metrics)) if line]
    return "\n".join([text, "", *under]) + "\n"


def _markdown_cells(row: Row) -> list[str]:
    mark = "**" if row.label else ""
    cells = [row.method, row.score, row.params, *map(shown, row.values)]
    return [f"{mark}{escape_markdown(cell)}{mark}" if cell else "" for cell in cells]


def _text_lines(of: Table, with_std: bool, gap: int) -> list[str]:
    """The header's two lines and the body, every line of one width."""
    body = [[shown(value, with_std) for value in row.values] for row in of.rows]
    widths = _widths(of, body, gap)
    stub = 2 + max(len(text) for row in of.rows for text in (row.score, row.method))
    lines = [" " * stub + _spanned(of, widths, gap)]
    lines.append("score".ljust(stub) + aligned([c.name for c in of.columns], widths, gap))
    rows = iter(zip(of.rows, body, strict=True))
    for method, members in of.methods:
        lines.append(method)
        for row, cells in (next(rows) for _ in members):
            label = f"{'*' if row.label else ' '} {row.score}".ljust(stub)
            lines.append(label + aligned(cells, widths, gap))
    return [line.rstrip() for line in lines]


def _widths(of: Table, body: Sequence[Sequence[str]], gap: int) -> list[int]:
    """Of each column: its cells fit, and so does the head of its group over the whole group."""
    widths = [
        max(len(column.name), *(len(cells[i]) for cells in body))
        for i, column in enumerate(of.columns)
    ]
    at = 0
    for head, count in of.heads:
        widths[at] += max(0, len(head) + 1 - sum(widths[at : at + count]) - gap * count)
        at += count
    return widths


def _spanned(of: Table, widths: Sequence[int], gap: int) -> str:
    """The line of column groups, each over the right edge of the columns it spans."""
    line, at = "", 0
    for head, count in of.heads:
        line += head.rjust(sum(widths[at : at + count]) + gap * count)
        at += count
    return line


def _left_out(metrics: Metrics, narrow: bool, with_std: bool) -> list[str]:
    if narrow:
        return [f"Groups left out for width: {', '.join(g for g in groups(metrics) if g != MEAN)}."]
    if not with_std and len(metrics.seeds) > 1:
        return ["Standard deviations left out for width."]
    return []


def _chosen(method: str, rows: Sequence[Row]) -> str:
    chosen = "; ".join(f"{row.score} {row.params}" for row in rows if row.params)
    return f"Chosen on validation for {method}: {chosen}" if chosen else ""
