"""What a run found, as one self-contained HTML page and as PNG files for docs.

    html = page.write(metrics, ReportInputs(scores, config_yaml=text, stamp=stamp, sweep=sweep))

The page holds everything it shows (pictures as SVG or data URIs) and its bytes depend on nothing
but what it is given. All text that comes from data is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import jinja2
import pyarrow as pa
from markupsafe import Markup
from matplotlib.figure import Figure

from pipelines import plots
from pipelines.evaluate.metrics import Metrics, Rejected
from pipelines.records import HeadKey
from pipelines.report import figures as pictures
from pipelines.report import statements, tables
from pipelines.report.accuracy_detection import Point, accuracy_detection
from pipelines.report.figures import ScoredMethod
from pipelines.report.mistakes import Images, mistakes
from pipelines.report.patches import Maps, where_in_the_image
from pipelines.sweep import evidence as sweep_evidence
from pipelines.sweep import figures as sweep_figures
from pipelines.sweep.result import SweepResult

_REJECTED_SHOWN = 10
_TRIALS_SHOWN = 100

Scores: TypeAlias = Mapping[HeadKey, pa.Table]
# A picture with its title, as SVG.
Panel: TypeAlias = tuple[str, Markup]


@dataclass(frozen=True)
class ReportInputs:
    """What the page shows beside the metrics.

    Attributes:
        scores: the scores table of each head; the first seed of the chosen ones is drawn.
        config_yaml: the resolved configuration.
        stamp: what the run was made with (git sha, versions, fingerprints).
        sweep: the sweep's record; None where the page says nothing of it.
        surfaces: the post-hoc surfaces of the chosen trials, where the sweep wrote them.
        image: the encoded image of (set name, key), or None where it cannot be had.
        maps: of the patches of images; None where the page says nothing of them.
    """

    scores: Scores
    config_yaml: str
    stamp: Mapping[str, str]
    sweep: SweepResult | None = None
    surfaces: pa.Table | None = None
    image: Images | None = None
    maps: Maps | None = None


@dataclass
class Pictures:
    """Every panel of the page, under the name of its section; ROC curves by group of OOD sets."""

    accuracy: list[Panel] = field(default_factory=list)
    histogram: list[Panel] = field(default_factory=list)
    energy: list[Panel] = field(default_factory=list)
    roc: dict[str, list[Panel]] = field(default_factory=dict)
    sweep: list[Panel] = field(default_factory=list)


def write(metrics: Metrics, inputs: ReportInputs) -> str:
    """The whole report as one HTML page that loads nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scored, sweep = scored_methods(metrics, inputs.scores), inputs.sweep
    class_names, image = metrics.facts.class_names, inputs.image or _no_image
    wrong = [(item, list(mistakes(item, class_names, image))) for item in scored]
    by_row = [(metrics.row(item.method, item.score), kinds) for item, kinds in wrong]
    searched = sweep if sweep is not None and sweep.trials else None
    return environment.get_template("page.html.j2").render(
        metrics=metrics,
        sweep=sweep,
        config_yaml=inputs.config_yaml,
        stamp=inputs.stamp,
        tables=tables,
        main=tables.table(
            metrics, [*tables.main_columns(metrics), *tables.full_spectrum_columns(metrics)]
        ),
        shifted=tables.once_per_method(tables.table(metrics, tables.shifted_columns(metrics))),
        by_set=tables.table(metrics, tables.set_columns(metrics)),
        further=tables.table(metrics, tables.further_columns(metrics)),
        thresholds=tables.table(metrics, tables.accepted_columns(metrics)),
        threshold_of={(row.method, row.score): row.threshold for row in metrics.rows},
        compared=tables.comparison_table(metrics),
        order=list(metrics.methods),
        notes=statements.notes(metrics),
        shift=statements.shift(metrics),
        setting_of=statements.setting_of,
        threshold_note=statements.threshold_note(metrics),
        pictures=_drawn(metrics, scored, inputs),
        mistakes=wrong,
        where=inputs.maps and where_in_the_image(by_row, inputs.maps),
        rejected=_rejected(metrics.facts.rejected),
        trials_shown=_TRIALS_SHOWN,
        evidence=searched and sweep_evidence.evidence(searched, inputs.surfaces),
    )


def tracked_figures(metrics: Metrics) -> dict[str, float]:
    """The main table as MLflow keeps it: METHOD/SCORE/FIGURE, means over seeds."""
    figures: dict[str, float] = {}
    for row in metrics.rows:
        prefix = f"{row.method}/{row.score}"
        figures[f"{prefix}/id_accuracy"] = row.id_accuracy.mean
        if row.ood_accuracy is not None:
            figures[f"{prefix}/ood_accuracy"] = row.ood_accuracy.mean
        for metric, by_group in (("auroc", row.auroc), ("fpr", row.fpr)):
            figures |= {f"{prefix}/{metric}/{group}": v.mean for group, v in by_group.items()}
    return figures


def figures(metrics: Metrics, scores: Scores) -> dict[str, bytes]:
    """PNG files for the README, by file name: table, histograms, accuracy against detection."""
    whole = tables.table(metrics, tables.main_columns(metrics))
    drawn = {"table.png": pictures.table_picture(whole)}
    if scored := scored_methods(metrics, scores):
        drawn["histograms.png"] = pictures.histograms(scored)
        for x_label, labelled, others in _points(metrics, scored)[-1:]:
            drawn["accuracy_detection.png"] = accuracy_detection(labelled, others, x_label)
    return {name: plots.png(figure) for name, figure in drawn.items()}


def scored_methods(metrics: Metrics, scores: Scores) -> list[ScoredMethod]:
    """Each method under its selection criterion, where the first seed's scores are there."""
    found = []
    for method in metrics.methods:
        table = scores.get(HeadKey(method=method, seed=metrics.seeds[0]))
        if table is not None:
            row = metrics.criterion_row(method)
            found.append(ScoredMethod(method, row.score, row.threshold.value, table))
    return found


def _no_image(_set_name: str, _key: str) -> None:
    """Where no images are at hand."""


def _drawn(metrics: Metrics, scored: Sequence[ScoredMethod], inputs: ReportInputs) -> Pictures:
    drawn = Pictures()
    for x_label, points, others in _points(metrics, scored):
        figure = accuracy_detection(points, others, x_label)
        drawn.accuracy.append(_panel(x_label.removesuffix(" (%)") + " and detection", figure))
    for item in scored:
        drawn.histogram.append(_panel(f"{item.method} + {item.score}", pictures.histogram(item)))
        if (change := pictures.energy_change(item)) is not None:
            drawn.energy.append(_panel(item.method, change))
        for group in item.groups:
            figure = pictures.roc(item, group, metrics.target_tpr)
            panel = _panel(f"{item.method}, {group} OOD", figure)
            drawn.roc.setdefault(group, []).append(panel)
    if inputs.sweep is not None and inputs.sweep.trials:
        found = sweep_figures.drawn(inputs.sweep, inputs.surfaces)
        drawn.sweep = [_panel(title, figure) for _, title, figure in found]
    return drawn


def _panel(title: str, figure: Figure) -> Panel:
    return title, Markup(plots.svg(figure, title))  # matplotlib escapes its text


def _points(
    metrics: Metrics, scored: Sequence[ScoredMethod]
) -> list[tuple[str, list[Point], list[Point]]]:
    """For each kind of accuracy: its label, each method under its criterion, and under others."""
    criteria = {(item.method, item.score) for item in scored}
    found = []
    kinds = ((tables.id_accuracy, "ID ACC (%)"), (tables.ood_accuracy, "OOD ACC (%)"))
    for accuracy, label in kinds:
        columns = [tables.Column("", "", accuracy), tables.Column("", "", tables.auroc())]
        points = [
            Point(row.method, row.score, row.values[0], row.values[1])
            for row in tables.table(metrics, columns).rows
            if row.values[0] and row.values[1]
        ]
        marked = [point for point in points if (point.method, point.score) in criteria]
        if marked:
            found.append((label, marked, [point for point in points if point not in marked]))
    return found


def _rejected(entries: Sequence[Rejected]) -> list[tuple[str, int, list[Rejected]]]:
    """Rejected images by reason, the most frequent first: reason, count, the first few."""
    found: dict[str, list[Rejected]] = {}
    for entry in sorted(entries, key=lambda e: (e.source, e.key)):
        found.setdefault(entry.reason, []).append(entry)
    order = sorted(found, key=lambda reason: (-len(found[reason]), reason))
    return [(reason, len(found[reason]), found[reason][:_REJECTED_SHOWN]) for reason in order]
