"""The rows of the metrics as tables: one model behind HTML, Markdown, plain text and pictures.

A table is columns (each a value of a `MetricRow`) and rows (method x score), so that every
rendering shows the same numbers, in percent, as mean (std over seeds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from pipelines.evaluate.metrics import MEAN, Comparison, MetricRow, Metrics, SettingValue, Spread
from pipelines.ood import Interval
from pipelines.records import Role, SetName

# Which value of a row a column shows; None where the row has none.
Getter: TypeAlias = Callable[[MetricRow], Spread | None]

# Sets in the order of a reader's interest.
_ROLE_ORDER: tuple[Role, ...] = (
    "train", "outliers", "validation", "validation_shifted", "validation_ood", "test", "shifted",
    "ood",
)  # fmt: skip


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
    """A column: its heading, the heading's group, and which value of a row it shows."""

    group: str
    name: str
    value: Getter


@dataclass(frozen=True)
class Row:
    """A method judged by a score; `label` says why the row is marked, where it is."""

    method: str
    score: str
    params: str
    label: str
    values: tuple[Value | None, ...]


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


@dataclass(frozen=True)
class ComparisonRow:
    """Two scores under one method: a paired difference for each column, or None."""

    method: str
    first: str
    second: str
    entries: tuple[Comparison | None, ...]


@dataclass(frozen=True)
class ComparisonTable:
    """Paired differences as a table: `columns` are (metric, group), rows are pairs of scores."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[ComparisonRow, ...]

    @property
    def heads(self) -> list[tuple[str, int]]:
        """The metrics and how many columns each spans."""
        return [(name, len(list(span))) for name, span in groupby(c[0] for c in self.columns)]

    @property
    def methods(self) -> list[tuple[str, list[ComparisonRow]]]:
        """The rows of each method, in order."""
        return [(name, list(rows)) for name, rows in groupby(self.rows, lambda r: r.method)]


def table(metrics: Metrics, columns: Iterable[Column]) -> Table:
    """One row per method and score, with the values of `columns` (None: absent)."""
    several = len(metrics.seeds) > 1
    chosen = tuple(columns)
    rows = [
        Row(
            method=row.method,
            score=row.score,
            params=words(row.params),
            label=row.label,
            values=tuple(_value(column.value(row), several) for column in chosen),
        )
        for rows in metrics.methods.values()
        for row in rows
    ]
    return Table(chosen, tuple(rows))


def _value(spread: Spread | None, several: bool) -> Value | None:
    if spread is None:
        return None
    return Value(spread.mean, spread.std if several else None)


def id_accuracy(row: MetricRow) -> Spread:
    """Accuracy on ID test."""
    return row.id_accuracy


def ood_accuracy(row: MetricRow) -> Spread | None:
    """Accuracy on the shifted sets."""
    return row.ood_accuracy


def auroc(group: str = MEAN) -> Getter:
    """AUROC of a group of OOD sets."""
    return lambda row: row.auroc.get(group)


def fpr(group: str = MEAN) -> Getter:
    """FPR of a group of OOD sets."""
    return lambda row: row.fpr.get(group)


def main_columns(metrics: Metrics) -> list[Column]:
    """Zhu 2025's layout: ID ACC, OOD ACC, AUROC and FPR of each group of OOD sets."""
    columns = [Column("", "ID ACC", id_accuracy), Column("", "OOD ACC", ood_accuracy)]
    for figure, head in ((auroc, "AUROC"), (fpr, fpr_name(metrics))):
        columns += [Column(head, group, figure(group)) for group in groups(metrics)]
    return columns


def full_spectrum_columns(metrics: Metrics) -> list[Column]:
    """Detection with the shifted images counted as ID (Yang 2023), where there are any."""
    if not any(row.shifted for row in metrics.rows) or not ordered_sets(metrics, "ood"):
        return []
    return [
        Column(
            "full spectrum", "AUROC", lambda r: r.full_spectrum.auroc if r.full_spectrum else None
        ),
        Column("full spectrum", "FPR", lambda r: r.full_spectrum.fpr if r.full_spectrum else None),
    ]


def set_columns(metrics: Metrics) -> list[Column]:
    """AUROC and FPR of each OOD set."""

    def auroc_of(name: str) -> Getter:
        return lambda row: row.sets[name].auroc if name in row.sets else None

    def fpr_of(name: str) -> Getter:
        return lambda row: row.sets[name].fpr if name in row.sets else None

    return [
        Column(set_label(name), head, figure(name))
        for name in ordered_sets(metrics, "ood")
        for figure, head in ((auroc_of, "AUROC"), (fpr_of, "FPR"))
    ]


def shifted_columns(metrics: Metrics) -> list[Column]:
    """Accuracy on ID test and on each shifted set."""

    def accuracy(name: str) -> Getter:
        return lambda row: row.shifted.get(name)

    return [
        Column("accuracy", "ID test", id_accuracy),
        *(Column("accuracy", set_label(n), accuracy(n)) for n in ordered_sets(metrics, "shifted")),
    ]


def accepted_columns(metrics: Metrics) -> list[Column]:
    """The share of each test set that the validation threshold accepts."""

    def known(name: str) -> Getter:
        return lambda row: row.tpr.get(name)

    def unknown(name: str) -> Getter:
        return lambda row: row.validation_fpr.get(name)

    id_sets = ordered_sets(metrics, "test", "shifted")
    return [
        *(Column("known classes accepted", set_label(name), known(name)) for name in id_sets),
        *(Column("OOD accepted", set_label(n), unknown(n)) for n in ordered_sets(metrics, "ood")),
    ]


def further_columns(metrics: Metrics) -> list[Column]:
    """FPR and AUPR the other way round, calibration, and abstaining."""
    return [
        Column(fpr_name(metrics), "OOD positive", lambda row: row.fpr_ood.get(MEAN)),
        Column("AUPR, mean of sets", "ID positive", lambda row: row.aupr_id.get(MEAN)),
        Column("AUPR, mean of sets", "OOD positive", lambda row: row.aupr_ood.get(MEAN)),
        Column("calibration", "ECE", lambda row: row.ece),
        Column("abstaining", "AURC", lambda row: row.aurc),
        Column("abstaining", "AUGRC", lambda row: row.augrc),
    ]


def comparison_table(metrics: Metrics) -> ComparisonTable:
    """The paired differences of the metrics, a row per method and pair of scores."""
    entries = [c for name in metrics.methods for c in metrics.comparisons if c.method == name]
    columns = sorted({(c.metric, c.group) for c in entries}, key=lambda c: (c[0], group_rank(c[1])))
    found: dict[tuple[str, str, str], dict[tuple[str, str], Comparison]] = {}
    for entry in entries:
        place = entry.method, entry.first, entry.second
        found.setdefault(place, {})[entry.metric, entry.group] = entry
    rows = [ComparisonRow(*place, tuple(map(each.get, columns))) for place, each in found.items()]
    return ComparisonTable(tuple(columns), tuple(rows))


def verdict(metric: str, difference: Interval) -> str:
    """What a paired difference says of the first side: better, worse or neither."""
    if not difference.is_clear:
        return "no difference shown"
    return "better" if (difference.low > 0) == (metric != "fpr") else "worse"


def groups(metrics: Metrics) -> list[str]:
    """The groups of OOD sets that any row reports: near, mid, far, others by name, mean last."""
    return sorted({group for row in metrics.rows for group in row.auroc}, key=group_rank)


def group_rank(group: str) -> tuple[int, str]:
    """A sorting key for groups of OOD sets, nearest first."""
    order = {"near": 0, "mid": 1, "far": 2, MEAN: 4}
    return order.get(group, 3), group


def ordered_sets(metrics: Metrics, *roles: Role) -> list[str]:
    """The names of the sets of these roles (none: all), ID first, OOD from near to far."""
    wanted = roles or _ROLE_ORDER
    names = [name for name in metrics.facts.sets if SetName.parse(name).role in wanted]
    return sorted(names, key=set_rank)


def set_rank(name: str) -> tuple[int, tuple[int, str], str]:
    """A sorting key for set names, by role."""
    parsed = SetName.parse(name)
    group = group_rank(parsed.group) if parsed.role == "ood" else (0, "")
    return _ROLE_ORDER.index(parsed.role), group, name


def set_label(name: str) -> str:
    """A set's name for readers: `ID test`, `rotated`, `near: eight`."""
    parsed = SetName.parse(name)
    if parsed.role == "ood":
        return f"{parsed.group}: {parsed.name}"
    if parsed.role == "shifted" and parsed.name:
        return parsed.name
    if parsed.role == "validation_ood" and parsed.name:
        return f"OOD validation: {parsed.name}"
    if parsed.role == "validation_shifted" and parsed.name:
        return f"shifted validation: {parsed.name}"
    return {"test": "ID test", "validation": "ID validation"}.get(name, name)


def fpr_name(metrics: Metrics) -> str:
    """`FPR at 95 % TPR`, with the metrics' own target."""
    return f"FPR at {100 * metrics.target_tpr:g} % TPR"


def words(settings: Mapping[str, SettingValue]) -> str:
    """Settings as `tau=0.1, c=2`: by name, the temperature first."""
    ordered = sorted(settings, key=lambda key: (key != "tau", key))
    return ", ".join(f"{key}={_short(settings[key])}" for key in ordered)


def _short(value: SettingValue) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def once_per_method(whole: Table) -> Table:
    """Only the first row of each method: accuracy does not depend on the score."""
    return Table(whole.columns, tuple(rows[0] for _, rows in whole.methods))


def shown(value: Value | None, with_std: bool = True) -> str:
    """A cell as text; a dash where there is no value."""
    if value is None:
        return "-"
    return str(value) if with_std else value.percent


def aligned(cells: Sequence[str], widths: Sequence[int], gap: int) -> str:
    """Cells, each right-aligned to its width after a gap."""
    return "".join(" " * gap + cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
