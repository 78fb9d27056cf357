"""What fine-tuning a network with outliers gained, and what it cost in ID accuracy.

From the run of `conf/results_cifar10_outliers.yaml`: ResNet-20 as it is and fine-tuned by outlier
exposure, energy margins, balanced energy and OECC, three seeds. Each gain is a fine-tuned network
under a score minus the pretrained one under the same score, with its paired 95 % interval, OOD sets
pooled; accuracy is paired by ID test image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.evaluate.scored import DIFFERENCES
from pipelines.experiments.result_runs import (
    ResultRun,
    accuracy_gain,
    detection_gain,
    open_runs,
)
from pipelines.ood import Interval
from pipelines.plots import markdown_table, write_csv

WORDS = ("preset=results_cifar10_outliers",)
PRETRAINED = "classifier"
SCORES = ("msp", "energy", "knn")


def run(folder: Path) -> str:
    """Write network_results.csv; return the tables as Markdown.

    Raises:
        ConfigError: where the run is missing, with its command.
    """
    runs, _ = open_runs([WORDS])
    write(folder / "network_results.csv", runs[0], SCORES)
    return "\n\n".join(
        (
            *absolute(runs[0], SCORES),
            *gained(runs, PRETRAINED, SCORES, over="the pretrained network"),
        )
    )


def write(path: Path, result: ResultRun, scores: Sequence[str]) -> None:
    """Detection by method and score, mean of the OOD sets and deviation over seeds, as CSV."""
    header = ["method", "score", "auroc", "auroc std", "fpr", "fpr std"]
    write_csv(path, header, _figures(result, scores))


def methods_of(result: ResultRun) -> list[str]:
    """The methods of a run, in its order."""
    return list(dict.fromkeys(row.method for row in result.metrics.rows))


def absolute(result: ResultRun, scores: Sequence[str]) -> tuple[str, str]:
    """Accuracy and detection of every method by every score: a sentence and a table."""
    rows = [
        [name, score, _accuracy(result, name), f"{a:.1f} ({b:.1f})", f"{c:.1f} ({d:.1f})"]
        for name, score, a, b, c, d in _figures(result, scores)
    ]
    header = ["method", "score", "ID accuracy", "AUROC", "FPR at 95 % TPR"]
    return (
        "Percent, mean and standard deviation over seeds, mean of the OOD sets:",
        markdown_table(header, rows, num_texts=2),
    )


def gained(
    runs: Sequence[ResultRun], reference: str, scores: Sequence[str], *, over: str
) -> tuple[str, str, str, str]:
    """What every other method gained over one of them: two sentences, each with its table.

    Args:
        runs: what the intervals are means over.
        reference: the method that gains are counted from.
        scores: detection is compared under the same score.
        over: the reference in words.
    """
    others = [name for name in methods_of(runs[0]) if name != reference]
    detection = [
        [name, score, *(_text(gain) for gain in _gains(runs, (name, reference), score))]
        for name in others
        for score in scores
    ]
    accuracy = [(n, _text(accuracy_gain(runs, n, reference, "test"))) for n in others]
    return (
        f"Points gained over {over} under the same score:",
        markdown_table(["method", "score", "AUROC", "FPR"], detection, num_texts=2),
        f"ID accuracy, points gained over {over}:",
        markdown_table(["method", "accuracy"], accuracy, num_texts=1),
    )


def _figures(
    result: ResultRun, scores: Sequence[str]
) -> list[tuple[str, str, float, float, float, float]]:
    return [_detection(result, method, score) for method in methods_of(result) for score in scores]


def _detection(
    run: ResultRun, method: str, score: str
) -> tuple[str, str, float, float, float, float]:
    row = run.metrics.row(method, score)
    auroc, fpr = row.auroc["mean"], row.fpr["mean"]
    return method, score, 100 * auroc.mean, 100 * auroc.std, 100 * fpr.mean, 100 * fpr.std


def _accuracy(run: ResultRun, method: str) -> str:
    value = next(row for row in run.metrics.rows if row.method == method).id_accuracy
    return f"{100 * value.mean:.2f} ({100 * value.std:.2f})"


def _gains(runs: Sequence[ResultRun], methods: tuple[str, str], score: str) -> tuple[Interval, ...]:
    places = (methods[0], score), (methods[1], score)
    return tuple(detection_gain(runs, *places, metric) for metric in DIFFERENCES)


def _text(gain: Interval) -> str:
    return f"{100 * gain.value:+.2f} [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
