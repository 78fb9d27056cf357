"""What a run found, as one self-contained HTML page, as text for the terminal and for docs.

    page = report.write(metrics, scores, sweep=sweep, config_yaml=text, stamp=stamp, image=image)
    print(report.text_table(metrics))

The page holds everything it shows (pictures as SVG or data URIs) and its bytes depend on nothing
but what it is given. All text that comes from data is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines import plots
from pipelines.report import figures as pictures
from pipelines.report import tables
from pipelines.report.accuracy_detection import Point, accuracy_detection
from pipelines.report.figures import Judged
from pipelines.report.tables import markdown_table, text_table
from pipelines.sweep import evidence as sweep_evidence
from pipelines.sweep import figures as sweep_figures
from pipelines.sweep.result import SweepResult

__all__ = ["figures", "markdown_table", "text_table", "write"]

_SAMPLES = 6
_THUMBNAIL = 112
_REJECTED_SHOWN = 10
_TRIALS_SHOWN = 100


Images = Callable[[str, str], bytes | None]
Scores = Mapping[tuple[str, int], pa.Table]


@dataclass(frozen=True)
class Mistake:
    """An image that a method gets wrong: its thumbnail as a data URI, and what was said of it."""

    set_label: str
    key: str
    truth: str
    predicted: str
    confidence: float
    score: float
    picture: str


def write(
    metrics: Mapping[str, Any],
    scores: Scores,
    *,
    sweep: Mapping[str, Any],
    config_yaml: str,
    stamp: Mapping[str, str],
    surfaces: pa.Table | None = None,
    image: Images | None = None,
) -> str:
    """The whole report as one HTML page that loads nothing.

    Args:
        metrics: the content of `metrics.json`.
        scores: the scores table of each (method, seed); the first seed is drawn.
        sweep: the content of `sweep.json`; empty where nothing was swept.
        config_yaml: the resolved configuration.
        stamp: what the run was made with (git sha, versions, fingerprints).
        surfaces: the post-hoc surfaces of the chosen trials, where the sweep wrote them.
        image: the encoded image of (set name, key), or None where it cannot be had.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    judged = _judged(metrics, scores, sweep)
    return environment.get_template("page.html.j2").render(
        metrics=metrics,
        sweep=sweep,
        config_yaml=config_yaml,
        stamp=stamp,
        tables=tables,
        main=tables.table(metrics, tables.main_columns(metrics)),
        shifted=_once_per_method(tables.table(metrics, tables.shifted_columns(metrics))),
        by_set=tables.table(metrics, tables.set_columns(metrics)),
        further=tables.table(metrics, tables.further_columns()),
        thresholds=tables.table(metrics, tables.accepted_columns(metrics)),
        threshold_of={(r["method"], r["score"]): r["threshold"] for r in metrics["rows"]},
        compared=tables.comparisons(metrics),
        order=list(_rows_by_method(metrics)),
        threshold_note=_threshold_note(metrics),
        pictures=_drawn(metrics, judged),
        mistakes=[
            (item, list(_mistakes(item, metrics["class_names"], image or _no_image)))
            for item in judged
        ],
        rejected=_rejected(metrics.get("rejected") or []),
        trials_shown=_TRIALS_SHOWN,
        evidence=_evidence(sweep, surfaces),
    )


def figures(
    metrics: Mapping[str, Any], scores: Scores, *, sweep: Mapping[str, Any]
) -> dict[str, bytes]:
    """PNG files for the README, by file name: table, histograms, accuracy against detection."""
    whole = tables.table(metrics, tables.main_columns(metrics))
    drawn = {"table.png": pictures.table_picture(whole)}
    if judged := _judged(metrics, scores, sweep):
        drawn["histograms.png"] = pictures.histograms(judged)
        for x_label, own, others in _points(metrics, judged)[-1:]:
            drawn["accuracy_detection.png"] = accuracy_detection(own, others, x_label)
    return {name: plots.png(figure) for name, figure in drawn.items()}


def _no_image(_set_name: str, _key: str) -> None:
    """Where no images are at hand."""


def _judged(metrics: Mapping[str, Any], scores: Scores, sweep: Mapping[str, Any]) -> list[Judged]:
    """Each method with its own score, where the first seed's scores table is there."""
    found = []
    for method, rows in _rows_by_method(metrics).items():
        table = scores.get((method, metrics["seeds"][0]))
        if table is not None:
            row = _own(rows, (sweep.get("methods") or {}).get(method) or {})
            value = float(row["threshold"]["value"])
            found.append(Judged(method, row["score"], value, table))
    return found


def _own(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the method's own score: as its setting names it, else marked, else the first."""
    own = (chosen.get("setting") or {}).get("score")
    named = [row for row in rows if row["score"] == own]
    marked = [row for row in rows if row.get("cell")]
    return [*named, *marked, *rows][0]


def _rows_by_method(metrics: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in metrics["rows"]:
        found.setdefault(row["method"], []).append(row)
    return found


def _once_per_method(whole: tables.Table) -> tables.Table:
    """Only the first row of each method: accuracy does not depend on the score."""
    return tables.Table(whole.columns, tuple(rows[0] for _, rows in whole.methods))


def _threshold_note(metrics: Mapping[str, Any]) -> str:
    """One line on what the threshold, set on ID, does to shifted images."""
    found = [
        (tpr["mean"], name, row)
        for row in metrics["rows"]
        for name, tpr in row["tpr"].items()
        if name.startswith("shifted/")
    ]
    target = f"{100 * metrics['target_tpr']:g} %"
    if not found:
        return f"Each threshold is set to accept {target} of the ID validation images."
    least, name, row = min(found, key=lambda item: item[0])
    return (
        f"A threshold that accepts {target} of the ID validation images also rejects shifted "
        f"images of the same classes: of {tables.set_label(name)}, {row['method']} + "
        f"{row['score']} accepts {100 * least:.1f} %, the least here."
    )


def _drawn(metrics: Mapping[str, Any], judged: Sequence[Judged]) -> dict[str, Any]:
    """Every panel as (title, SVG), under the name of its picture; ROC curves by group of sets."""
    drawn: dict[str, Any] = {"accuracy": [], "histogram": [], "energy": [], "roc": {}}
    for x_label, points, others in _points(metrics, judged):
        figure = accuracy_detection(points, others, x_label)
        drawn["accuracy"].append(_panel(x_label.removesuffix(" (%)") + " and detection", figure))
    for item in judged:
        own = f"{item.method} + {item.score}"
        drawn["histogram"].append(_panel(own, pictures.histogram(item)))
        if (change := pictures.energy_change(item)) is not None:
            drawn["energy"].append(_panel(item.method, change))
        for group in item.groups:
            figure = pictures.roc(item, group, metrics["target_tpr"])
            drawn["roc"].setdefault(group, []).append(_panel(f"{item.method}, {group} OOD", figure))
    return drawn


def _evidence(sweep: Mapping[str, Any], surfaces: pa.Table | None) -> dict[str, Any]:
    """What the trials say, and their pictures as (title, SVG)."""
    if not sweep.get("trials"):
        return {}
    result = SweepResult.model_validate(sweep)
    return {
        **sweep_evidence.evidence(result, surfaces).model_dump(mode="json"),
        "pictures": [
            _panel(title, figure) for _, title, figure in sweep_figures.drawn(result, surfaces)
        ],
    }


def _panel(title: str, figure: Any) -> tuple[str, Markup]:
    return title, Markup(plots.svg(figure, title))  # matplotlib escapes its text


def _points(
    metrics: Mapping[str, Any], judged: Sequence[Judged]
) -> list[tuple[str, list[Point], list[Point]]]:
    """For each kind of accuracy: its label, each method with its own score, and with others."""
    own = {(item.method, item.score) for item in judged}
    found = []
    for key, label in (("id_accuracy", "ID ACC (%)"), ("ood_accuracy", "OOD ACC (%)")):
        columns = [tables.Column("", "", (key,)), tables.Column("", "", ("auroc", "mean"))]
        rows = tables.table(metrics, columns).rows
        points = [
            Point(row.method, row.score, row.values[0], row.values[1])
            for row in rows
            if row.values[0] and row.values[1]
        ]
        marked = [point for point in points if (point.method, point.score) in own]
        if marked:
            found.append((label, marked, [point for point in points if point not in marked]))
    return found


def _mistakes(
    judged: Judged, class_names: Sequence[str], image: Images
) -> Iterator[tuple[str, int, list[Mistake]]]:
    """Each kind of mistake: its name, how many there are, and the most confident of them."""
    table = judged.table
    kinds = judged.row_kinds
    score = np.asarray(table[f"score_{judged.score}"], dtype=np.float64)
    confidence = np.asarray(table["confidence"], dtype=np.float64)
    wrong = np.asarray(table["predicted"]) != np.asarray(table["label"])
    accepted, known = score >= judged.threshold, kinds == "ID"
    found: list[tuple[str, NDArray[np.bool_], NDArray[np.float64]]] = [
        ("ID taken for OOD", known & ~accepted, score),
        ("ID with the wrong class", known & wrong, -confidence),
        *(
            (f"{group} OOD accepted", (kinds == group) & accepted, -score)
            for group in judged.groups
        ),
    ]
    named = table.append_column("score", pa.array(score))
    for mistake, chosen, worst in found:
        ranked = named.filter(pa.array(chosen)).append_column("worst", pa.array(worst[chosen]))
        ranked = ranked.sort_by(
            [("worst", "ascending"), ("set", "ascending"), ("key", "ascending")]
        )
        samples = ranked.slice(0, _SAMPLES).to_pylist()
        yield mistake, len(ranked), [_mistake(sample, class_names, image) for sample in samples]


def _mistake(sample: Mapping[str, Any], classes: Sequence[str], image: Images) -> Mistake:
    return Mistake(
        set_label=tables.set_label(sample["set"]),
        key=sample["key"],
        truth=classes[sample["label"]] if sample["label"] >= 0 else "",
        predicted=classes[sample["predicted"]],
        confidence=sample["confidence"],
        score=sample["score"],
        picture=_thumbnail(image(sample["set"], sample["key"])),
    )


def _thumbnail(encoded: bytes | None) -> str:
    """A small copy of an image as a data URI; empty where there is none or it cannot be read."""
    if encoded is None:
        return ""
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            opened.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small = max(image.size) <= 40  # few pixels: keep them sharp
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    form = "PNG" if small else "JPEG"
    image.save(buffer, form, **({} if small else {"quality": 82}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _rejected(
    entries: Sequence[Mapping[str, str]],
) -> list[tuple[str, int, list[Mapping[str, str]]]]:
    """Rejected images by reason, the most frequent first: reason, count, the first few."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for entry in sorted(entries, key=lambda e: (e["source"], e["key"])):
        found.setdefault(entry["reason"], []).append(entry)
    order = sorted(found, key=lambda reason: (-len(found[reason]), reason))
    return [(reason, len(found[reason]), found[reason][:_REJECTED_SHOWN]) for reason in order]
