"""What bfloat16 costs: AUROC of every score with the image tower in bfloat16 and in float32.

Each network is run twice by `conf/results_networks.yaml`, once a precision, so features, fits and
passes over the pixels are all of that precision. The paired 95 % interval of the difference is
over the same images, OOD sets pooled. `backbone.precision=auto` is for the backbones whose every
score stays within LIMIT here (`bf16_checked` of their YAML).
"""

from __future__ import annotations

from pathlib import Path

from pipelines.config import ConfigError
from pipelines.evaluate.scored import Scored
from pipelines.experiments.result_runs import NUM_RESAMPLES, open_runs
from pipelines.plots import markdown_table, write_csv

PRESET = "preset=results_networks"
NETWORKS = {
    "ResNet-20": ("backbone=cifar10_resnet20", "benchmark=cifar10"),
    "ResNet-56": ("backbone=cifar10_resnet56", "benchmark=cifar10"),
    "DenseNet-BC-100": ("backbone=cifar10_densenet100", "benchmark=cifar10"),
    "EfficientNet-Lite0": ("backbone=imagenet_effnet_lite0", "benchmark=imagenet_small"),
}
PRECISIONS = ("fp32", "bf16")
LIMIT = 0.1  # points of AUROC


def run(folder: Path) -> str:
    """Write precision.csv; return a table a network as Markdown.

    Raises:
        ConfigError: where no network has been run in both precisions, with the commands.
    """
    parts: list[str] = []
    rows: list[tuple[object, ...]] = []
    missing: list[str] = []
    for network, words in NETWORKS.items():
        heads, commands = _heads(words)
        missing += commands
        if len(heads) == len(PRECISIONS):
            exact, reduced = heads
            changes = _changes(exact, reduced)
            rows += [(network, *row) for row in changes]
            parts.append(_section(network, exact, reduced, changes))
    if not rows:
        raise ConfigError(["not in ./outputs yet; run first:", *missing])
    write_csv(folder / "precision.csv", ["network", "score", "fp32", "change", "low", "high"], rows)
    parts += [f"Not run yet, so not in the tables: `{command}`" for command in missing]
    return "\n\n".join(parts)


def _heads(words: tuple[str, ...]) -> tuple[list[Scored], list[str]]:
    """The network's own layer in each precision that was run, and the commands of the others."""
    heads, missing = [], []
    for precision in PRECISIONS:
        line = (PRESET, *words, f"backbone.precision={precision}")
        try:
            (found,), _ = open_runs([line])
        except ConfigError:
            missing.append(f"python -m jobs.pipeline {' '.join(line)}")
        else:
            heads += found.seeds("classifier")
    return heads, missing


def _changes(exact: Scored, reduced: Scored) -> list[tuple[str, float, float, float, float]]:
    """Of each score AUROC in float32, and what bfloat16 changes with its interval, in points."""
    rows = []
    columns = [c for c in exact.table.column_names if c.startswith("score_")]
    for score in (column.removeprefix("score_") for column in columns):
        after, before = (
            head.resampled("auroc", score, head.ood, NUM_RESAMPLES) for head in (reduced, exact)
        )
        change = after.minus(before)
        points = (100 * value for value in (change.value, change.low, change.high))
        rows.append((score, 100 * before.value, *points))
    return rows


def _section(
    network: str,
    exact: Scored,
    reduced: Scored,
    changes: list[tuple[str, float, float, float, float]],
) -> str:
    largest = max(changes, key=lambda row: abs(row[2]))
    over = [row[0] for row in changes if abs(row[2]) > LIMIT]
    beyond = f"over {LIMIT} point: {', '.join(over)}" if over else f"none is over {LIMIT} point"
    table = [
        [s, f"{a:.2f}", f"{d:+.3f} [{low:+.3f}, {high:+.3f}]"] for s, a, d, low, high in changes
    ]
    return (
        f"{network}: ID accuracy {100 * exact.accuracy('test'):.2f} % in float32, "
        f"{100 * reduced.accuracy('test'):.2f} % in bfloat16. The largest change of AUROC is "
        f"{largest[2]:+.3f} points ({largest[0]}); {beyond}.\n\n"
        + markdown_table(["score", "AUROC, float32", "bfloat16 minus float32"], table, num_texts=1)
    )
