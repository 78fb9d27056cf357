"""The numbers of `metrics.json` as tables: one row model behind HTML, Markdown and plain text.

A table is columns (each a path into a row of the metrics) and rows (method x score), so that
every rendering shows the same numbers, in percent, as mean (std over seeds).
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

TEXT_WIDTH = 110
_LOWER_IS_BETTER = ("fpr",)


@dataclass(frozen=True)
class Value:
    """A mean over seeds and its standard deviation (None: one seed), as fractions in [0, 1]."""

    mean: float
    std: float | None

    @property
    def percent(self) -> str:
        """The mean in percent, one decimal."""
        return f"{100 * self.mean:.1f}"

    @property
    def spread(self) -> str:
        """The standard deviation in percent, one decimal; empty where there is none."""
        return "" if self.std is None else f"({100 * self.std:.1f})"

    def __str__(self) -> str:
        """`97.3 (0.4)`, or `97.3` of one seed."""
        return f"{self.percent} {self.spread}".rstrip()


@dataclass(frozen=True)
class Column:
    """A column: its heading, the heading's group, and where a row of the metrics holds it."""

    group: str
    name: str
    path: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A method judged by a score."""

    method: str
    score: str
    params: str
    cell: str
    values: tuple[Value | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Score `a` against `b` under one method: a paired interval for each column, or None."""

    method: str
    a: str
    b: str
    entries: tuple[Mapping[str, Any] | None, ...]


@dataclass(frozen=True)
class Comparisons:
    """Paired intervals as a table: `columns` are (metric, group), rows are pairs of scores."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[Comparison, ...]

    @property
    def heads(self) -> list[tuple[str, int]]:
        """The metrics and how many columns each spans."""
        return [(name, len(list(span))) for name, span in groupby(c[0] for c in self.columns)]

    @property
    def methods(self) -> list[tuple[str, list[Comparison]]]:
        """The rows of each method, in order."""
        return [(name, list(rows)) for name, rows in groupby(self.rows, lambda r: r.method)]


@dataclass(frozen=True)
class Table:
    """Columns and rows; `values` of a row stand in the order of `columns`."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def heads(self) -> list[tuple[str, int]]:
        """The column groups and how many columns each spans."""
        return [(name, len(list(span))) for name, span in groupby(c.group for c in self.columns)]

    @property
    def methods(self) -> list[tuple[str, list[Row]]]:
        """The rows of each method, in order."""
        return [(name, list(rows)) for name, rows in groupby(self.rows, lambda r: r.method)]


def table(metrics: Mapping[str, Any], columns: Sequence[Column]) -> Table:
    """One row per method and score, with the values that `columns` point to (None: absent)."""
    several = len(metrics["seeds"]) > 1
    rows = [
        Row(
            method=row["method"],
            score=row["score"],
            params=words(row.get("params") or {}),
            cell=row.get("cell") or "",
            values=tuple(_value(row, column.path, several) for column in columns),
        )
        for row in _by_method(metrics["rows"])
    ]
    return Table(tuple(columns), tuple(rows))


def main_columns(metrics: Mapping[str, Any]) -> list[Column]:
    """Zhu 2025's layout: ID ACC, OOD ACC, AUROC and FPR of each group of OOD sets."""
    columns = [Column("", "ID ACC", ("id_accuracy",)), Column("", "OOD ACC", ("ood_accuracy",))]
    for name, head in (("auroc", "AUROC"), ("fpr", fpr_name(metrics))):
        columns += [Column(head, group, (name, group)) for group in groups(metrics)]
    return columns


def set_columns(metrics: Mapping[str, Any]) -> list[Column]:
    """AUROC and FPR of each OOD set."""
    names = [name for name in ordered_sets(metrics) if name.startswith("ood/")]
    return [
        Column(set_label(name), head, ("sets", name, key))
        for name in names
        for key, head in (("auroc", "AUROC"), ("fpr", "FPR"))
    ]


def shifted_columns(metrics: Mapping[str, Any]) -> list[Column]:
    """Accuracy on ID test and on each shifted set."""
    names = [name for name in ordered_sets(metrics) if name.startswith("shifted/")]
    first = Column("accuracy", "ID test", ("id_accuracy",))
    return [first, *(Column("accuracy", set_label(name), ("shifted", name)) for name in names)]


def accepted_columns(metrics: Mapping[str, Any]) -> list[Column]:
    """The share of each test set that the validation threshold accepts."""
    found = []
    for name in ordered_sets(metrics):
        if name == "test" or name.startswith("shifted/"):
            found.append(Column("known classes accepted", set_label(name), ("tpr", name)))
        elif name.startswith("ood/"):
            found.append(Column("OOD accepted", set_label(name), ("validation_fpr", name)))
    return found


def further_columns() -> list[Column]:
    """AUPR both ways, full-spectrum detection (shifted counts as ID) and calibration."""
    return [
        Column("AUPR, mean of sets", "ID positive", ("aupr_id", "mean")),
        Column("AUPR, mean of sets", "OOD positive", ("aupr_ood", "mean")),
        Column("full spectrum", "AUROC", ("full_spectrum", "auroc")),
        Column("full spectrum", "FPR", ("full_spectrum", "fpr")),
        Column("calibration", "ECE", ("ece",)),
    ]


def groups(metrics: Mapping[str, Any]) -> list[str]:
    """The groups of OOD sets that any row reports: near, mid, far, others by name, mean last."""
    found = {group for row in metrics["rows"] for group in row["auroc"]}
    return sorted(found, key=group_rank)


def group_rank(group: str) -> tuple[int, str]:
    """A sorting key for groups of OOD sets, nearest first."""
    order = {"near": 0, "mid": 1, "far": 2, "mean": 4}
    return order.get(group, 3), group


def ordered_sets(metrics: Mapping[str, Any]) -> list[str]:
    """The names of the sets: ID first, then shifted, then OOD from near to far."""
    return sorted(metrics["sets"], key=set_rank)


def set_rank(name: str) -> tuple[Any, ...]:
    """A sorting key for set names, by role."""
    roles = ("train", "outliers", "validation", "validation_ood", "test", "shifted", "ood")
    role, *way = name.split("/")
    position = roles.index(role) if role in roles else len(roles)
    return position, group_rank(way[0]) if role == "ood" and way else (0, ""), name


def set_label(name: str) -> str:
    """A set's name for readers: `ID test`, `rotated`, `near: eight`."""
    role, *way = name.split("/")
    if role == "ood" and len(way) > 1:
        return f"{way[0]}: {'/'.join(way[1:])}"
    if role == "shifted" and way:
        return "/".join(way)
    if role == "validation_ood" and way:
        return f"OOD validation: {'/'.join(way)}"
    return {"test": "ID test", "validation": "ID validation"}.get(name, name)


def fpr_name(metrics: Mapping[str, Any]) -> str:
    """`FPR at 95 % TPR`, with the metrics' own target."""
    return f"FPR at {100 * metrics['target_tpr']:g} % TPR"


def words(settings: Mapping[str, Any]) -> str:
    """Settings as `tau=0.1, c=2`: by name, the temperature first."""
    ordered = sorted(settings, key=lambda key: (key != "tau", key))
    return ", ".join(f"{key}={_short(settings[key])}" for key in ordered)


def comparison(entry: Mapping[str, Any]) -> str:
    """What a paired interval of `a` minus `b` says of `a`: better, worse or neither."""
    low, high = entry["low"], entry["high"]
    if entry["metric"] in _LOWER_IS_BETTER:
        low, high = -high, -low
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"


def comparisons(metrics: Mapping[str, Any]) -> Comparisons:
    """The paired intervals of the metrics, a row per method and pair of scores."""
    entries = _by_method(metrics.get("paired") or [])
    columns = sorted(
        {(entry["metric"], entry["group"]) for entry in entries},
        key=lambda column: (column[0], group_rank(column[1])),
    )
    found: dict[tuple[str, str, str], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for entry in entries:
        place = entry["method"], entry["a"], entry["b"]
        found.setdefault(place, {})[entry["metric"], entry["group"]] = entry
    rows = [Comparison(*place, tuple(map(each.get, columns))) for place, each in found.items()]
    return Comparisons(tuple(columns), tuple(rows))


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """What it takes to read the table: sets, seeds, conventions, the benchmark's notes."""
    seeds = len(metrics["seeds"])
    over = f"mean (std) over {seeds} seeds" if seeds > 1 else "one seed"
    sets = "; ".join(f"{set_label(n)} {metrics['sets'][n]:,}" for n in ordered_sets(metrics))
    lines = [
        f"Benchmark {metrics['benchmark']}, backbone {metrics['backbone']}. Percent, {over}. "
        "ID is positive; AUROC: higher is better, FPR: lower is better; mean: over all OOD sets.",
        f"Images: {sets}.",
    ]
    reasons = Counter(entry["reason"] for entry in metrics.get("rejected") or [])
    if reasons:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        lines.append(f"Rejected images, left out of all figures: {counts}.")
    extra = metrics.get("notes") or []
    return lines + ([extra] if isinstance(extra, str) else list(extra))


def verdicts(metrics: Mapping[str, Any]) -> list[str]:
    """Whether DeltaEnergy beats each other score, one line a method: all OOD images pooled."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in metrics["rows"]):
        said = [
            f"{entry['b']} {_points(entry)} {comparison(entry)}"
            for entry in metrics.get("paired") or []
            if (entry["method"], entry["metric"], entry["group"]) == (method, "auroc", "mean")
        ]
        if said:
            lines.append(f"{method}: DeltaEnergy's AUROC minus that of {'; '.join(said)}")
    if lines:
        lines.insert(0, "Differences in points with 95 % paired bootstrap intervals, OOD pooled:")
    return lines


def accepted(metrics: Mapping[str, Any]) -> list[str]:
    """What the thresholds of the marked rows do to shifted images, which are still ID."""
    lines = []
    for row in metrics["rows"]:
        shares = [f"{set_label(n)} {100 * v['mean']:.1f}" for n, v in row["tpr"].items()]
        if row["cell"] and len(shares) > 1:
            lines.append(
                f"Accepted as ID by {row['method']} + {row['score']} (%): {'; '.join(shares)}"
            )
    return lines


def improvements(metrics: Mapping[str, Any]) -> list[str]:
    """What the chosen settings gained on the default ones, each method under its own score."""
    rows = metrics.get("best_against_default") or []
    lines = []
    for row in rows:
        if row["own"]:
            said = "; ".join(_improvement(metric, row[metric]) for metric in ("auroc", "fpr"))
            lines.append(f"{row['method']} + {row['score']}: {said}")
    if lines:
        seeds = ", ".join(map(str, rows[0]["seeds"]))
        lines.insert(
            0,
            f"Chosen against default settings (seed {seeds}, OOD pooled; percent, difference in "
            "points with its 95 % paired interval):",
        )
    return lines


def _improvement(metric: str, entry: Mapping[str, Any]) -> str:
    return (
        f"{metric.upper()} {100 * entry['chosen']:.1f} against {100 * entry['default']:.1f}, "
        f"{_points(entry)} {comparison({**entry, 'metric': metric})}"
    )


def changed(row: Mapping[str, Any], side: str) -> str:
    """The setting and the score's parameters of one side (`default`, `chosen`) of a row."""
    both = {**row[f"{side}_setting"], **row[f"{side}_params"]}
    return words(both) or "as configured"


def _points(entry: Mapping[str, Any]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(
        *(100 * entry[key] for key in ("difference", "low", "high"))
    )


def text_table(metrics: Mapping[str, Any]) -> str:
    """The main table for a terminal: grouped per method, aligned, at most `TEXT_WIDTH` wide.

    Where it would be wider, the gaps, then the standard deviations, then the single groups
    are left out, and a line says so.
    """
    whole = table(metrics, main_columns(metrics))
    narrow = table(metrics, [c for c in whole.columns if c.path[-1] == "mean" or not c.group])
    tries = [(whole, True, 2), (whole, True, 1), (whole, False, 2), (narrow, True, 2)]
    for candidate, with_std, gap in tries:
        lines = _text_lines(candidate, with_std, gap)
        if max(map(len, lines)) <= TEXT_WIDTH:
            break
    under = [f"* {row.method} + {row.score}: {row.cell}" for row in whole.rows if row.cell]
    under += _left_out(metrics, candidate is narrow, with_std)
    under += [_chosen(name, rows) for name, rows in whole.methods]
    under += [*notes(metrics), str(metrics.get("sentence") or "")]
    under += [*verdicts(metrics), *accepted(metrics), *improvements(metrics)]
    wrapped = [textwrap.fill(line, TEXT_WIDTH, subsequent_indent="  ") for line in under if line]
    return "\n".join([*lines, "", *wrapped])


def markdown_table(metrics: Mapping[str, Any]) -> str:
    """The main table as Markdown, numbers right-aligned, marked cells in bold."""
    whole = table(metrics, main_columns(metrics))
    heads = [f"{c.group} {c.name}".strip() for c in whole.columns]
    lines = [
        _markdown_row(["method", "score", "chosen", *heads]),
        _markdown_row(["---", "---", "---", *["---:"] * len(heads)]),
    ]
    for row in whole.rows:
        cells = [row.method, row.score, row.params, *map(_shown, row.values)]
        mark = "**" if row.cell else ""
        lines.append(_markdown_row([f"{mark}{_markdown(c)}{mark}" if c else "" for c in cells]))
    marked = [f"Bold: {r.method} + {r.score}: {r.cell}." for r in whole.rows if r.cell]
    under = [*marked, *notes(metrics), str(metrics.get("sentence") or "")]
    under += [*verdicts(metrics), *accepted(metrics), *improvements(metrics)]
    return "\n".join([*lines, "", *(_markdown(line) + "  " for line in under if line)]) + "\n"


def _text_lines(shown: Table, with_std: bool, gap: int) -> list[str]:
    """The header's two lines and the body, every line of one width."""
    body = [[_shown(v, with_std) for v in row.values] for row in shown.rows]
    widths = [
        max(len(column.name), *(len(cells[i]) for cells in body))
        for i, column in enumerate(shown.columns)
    ]
    stub = 2 + max(len(text) for row in shown.rows for text in (row.score, row.method))
    lines = [" " * stub + _spanned(shown, widths, gap)]
    lines.append("score".ljust(stub) + _aligned([c.name for c in shown.columns], widths, gap))
    rows = iter(zip(shown.rows, body, strict=True))
    for method, members in shown.methods:
        lines.append(method)
        for row, cells in (next(rows) for _ in members):
            label = f"{'*' if row.cell else ' '} {row.score}".ljust(stub)
            lines.append(label + _aligned(cells, widths, gap))
    return [line.rstrip() for line in lines]


def _spanned(shown: Table, widths: Sequence[int], gap: int) -> str:
    """The line of column groups, each over the right edge of the columns it spans."""
    line, at = "", 0
    for head, count in shown.heads:
        width = sum(widths[at : at + count]) + gap * count
        line += head.rjust(width) if len(head) < width else head[: width - 1].rjust(width)
        at += count
    return line


def _aligned(cells: Iterable[str], widths: Sequence[int], gap: int) -> str:
    return "".join(" " * gap + cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _left_out(metrics: Mapping[str, Any], narrow: bool, with_std: bool) -> list[str]:
    if narrow:
        return [
            f"Groups left out for width: {', '.join(g for g in groups(metrics) if g != 'mean')}."
        ]
    if not with_std and len(metrics["seeds"]) > 1:
        return ["Standard deviations left out for width."]
    return []


def _chosen(method: str, rows: Sequence[Row]) -> str:
    chosen = "; ".join(f"{row.score} {row.params}" for row in rows if row.params)
    return f"Chosen on validation for {method}: {chosen}" if chosen else ""


def _shown(value: Value | None, with_std: bool = True) -> str:
    if value is None:
        return "-"
    return str(value) if with_std else value.percent


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    """Text whose characters mean themselves in Markdown."""
    for character in "\\|<>*_`[]$":
        text = text.replace(character, f"\\{character}")
    return text


def _value(row: Mapping[str, Any], path: Sequence[str], several: bool) -> Value | None:
    found: Any = row
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or found.get("mean") is None:
        return None
    return Value(float(found["mean"]), float(found.get("std") or 0.0) if several else None)


def _by_method(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with each method's together, methods in their first order."""
    order = {name: i for i, name in enumerate(dict.fromkeys(row["method"] for row in rows))}
    return sorted(rows, key=lambda row: order[row["method"]])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
