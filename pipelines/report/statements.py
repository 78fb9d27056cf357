"""What the metrics say, a line each: below the tables of the page, the terminal and the docs."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pipelines.evaluate.compare import points
from pipelines.evaluate.metrics import MEAN, ChosenAgainstDefault, DefaultComparison, Metrics
from pipelines.report.tables import ordered_sets, set_label, set_rank, verdict, words


def statements(metrics: Metrics) -> list[str]:
    """All of them: how to read the table, and what it shows."""
    return [
        *notes(metrics),
        *shift(metrics),
        *([metrics.sentence] if metrics.sentence else []),
        *differences(metrics),
        *accepted(metrics),
        *improvements(metrics),
    ]


def notes(metrics: Metrics) -> list[str]:
    """What it takes to read the table: sets, seeds, conventions, the benchmark's notes."""
    facts, seeds = metrics.facts, len(metrics.seeds)
    over = f"mean (std) over {seeds} seeds" if seeds > 1 else "one seed"
    sets = "; ".join(f"{set_label(n)} {facts.sets[n]:,}" for n in ordered_sets(metrics))
    lines = [
        f"Benchmark {facts.benchmark}, backbone {facts.backbone}. Percent, {over}. "
        "ID is positive; AUROC: higher is better, FPR: lower is better; mean: over all OOD sets.",
        f"Images: {sets}.",
    ]
    reasons = Counter(entry.reason for entry in facts.rejected)
    if reasons:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        lines.append(f"Rejected images, left out of all figures: {counts}.")
    return [*lines, *([facts.notes] if facts.notes else [])]


def differences(metrics: Metrics) -> list[str]:
    """Whether the reference score beats each other one, one line a method: OOD images pooled."""
    lines = []
    for method in metrics.methods:
        pooled = [
            entry
            for entry in metrics.comparisons
            if (entry.method, entry.metric, entry.group) == (method, "auroc", MEAN)
        ]
        said = "; ".join(
            f"{e.second} {points(e.difference)} {verdict(e.metric, e.difference)}" for e in pooled
        )
        if said:
            lines.append(f"{method}: {pooled[0].first}'s AUROC minus that of {said}")
    if lines:
        lines.insert(0, "Differences in points with 95 % paired bootstrap intervals, OOD pooled:")
    return lines


def accepted(metrics: Metrics) -> list[str]:
    """What the thresholds of the marked rows do to shifted images, which are still ID."""
    return [
        f"Accepted as ID by {row.method} + {row.score} (%): "
        + "; ".join(
            f"{set_label(name)} {100 * v.mean:.1f}"
            for name, v in sorted(row.tpr.items(), key=lambda share: set_rank(share[0]))
        )
        for row in metrics.rows
        if row.label and len(row.tpr) > 1
    ]


def shift(metrics: Metrics) -> list[str]:
    """One line where the best detector's threshold refuses most of the shifted images.

    It says what keeping them would cost, and which row of the run pays least for it.
    """
    judged = [(row, row.full_spectrum) for row in metrics.rows if row.full_spectrum]
    criteria = [row for row, _ in judged if row.is_criterion and MEAN in row.auroc]
    if not criteria:
        return []
    best = max(criteria, key=lambda row: row.auroc[MEAN].mean)
    shares = [share.mean for name, share in best.tpr.items() if name.startswith("shifted/")]
    if not shares or sum(shares) / len(shares) >= 0.5:
        return []
    least, figures = min(judged, key=lambda one: one[1].fpr.mean)
    return [
        f"The threshold of the best detector, {best.method} + {best.score}, accepts only "
        f"{100 * sum(shares) / len(shares):.1f} % of the shifted images. A threshold that keeps "
        f"{100 * metrics.target_tpr:g} % of ID and shifted images together lets the fewest unknown "
        f"ones through under {least.method} + {least.score}: {100 * figures.fpr.mean:.1f} % "
        "(full-spectrum FPR; threshold.known=full_spectrum sets such a threshold)."
    ]


def improvements(metrics: Metrics) -> list[str]:
    """What the chosen settings gained, each method under its selection criterion."""
    rows = metrics.best_against_default
    lines = [
        f"{row.method} + {row.score}: {_improvement('auroc', row.auroc)}; "
        f"{_improvement('fpr', row.fpr)}"
        for row in rows
        if row.is_criterion
    ]
    if lines:
        seeds = ", ".join(map(str, rows[0].seeds))
        lines.insert(
            0,
            f"Chosen against default settings (seed {seeds}, OOD pooled; percent, difference in "
            "points with its 95 % paired interval):",
        )
    return lines


def _improvement(metric: str, entry: ChosenAgainstDefault) -> str:
    return (
        f"{metric.upper()} {100 * entry.chosen:.1f} against {100 * entry.default:.1f}, "
        f"{points(entry.difference)} {verdict(metric, entry.difference)}"
    )


def setting_of(row: DefaultComparison, side: Literal["default", "chosen"]) -> str:
    """The setting and the score's parameters of one side of a row."""
    if side == "default":
        return words({**row.default_setting, **row.default_params}) or "as configured"
    return words({**row.chosen_setting, **row.chosen_params}) or "as configured"


def threshold_note(metrics: Metrics) -> str:
    """One line on what the threshold, set on ID, does to shifted images."""
    target = f"{100 * metrics.target_tpr:g} % of the ID validation images"
    if any(row.threshold.rule != "quantile" for row in metrics.rows):
        target = f"{100 * metrics.target_tpr:g} % of new ID images"
    found = [
        (row.tpr[name].mean, name, row)
        for row in metrics.rows
        for name in ordered_sets(metrics, "shifted")
        if name in row.tpr
    ]
    if not found:
        return f"Each threshold is set to accept {target}."
    least, name, row = min(found, key=lambda item: item[0])
    return (
        f"A threshold that accepts {target} also rejects shifted "
        f"images of the same classes: of {set_label(name)}, {row.method} + {row.score} accepts "
        f"{100 * least:.1f} %, the least here."
    )
