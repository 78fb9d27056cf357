"""The figures of a finished run: what its metrics.json says of every scored method."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.experiments import demo
from tests.golden.recording import FOLDER, Recording

# Words of `python -m jobs.pipeline`, by the recording's name.
RUNS: dict[str, tuple[str, ...]] = {
    "demo": demo.WORDS,
    "results_digits": ("preset=results_digits",),
    "results_all": ("preset=results_all",),
    "results_all_swept": ("preset=results_all", "sweep=default"),
    "densities_digits": ("preset=results_densities",),
    "densities_pacs": ("preset=results_densities", "benchmark=pacs", "backbone=lit_effnet_lite0"),
}


def record(name: str, storage: Path) -> Recording:
    """Run the pipeline with the recording's words, in a process of its own, and read it."""
    words = (*RUNS[name], f"storage={storage}")
    before = set(_runs(storage))
    subprocess.run(
        [sys.executable, "-m", "jobs.pipeline", *words],
        cwd=FOLDER.parents[1],
        stdout=sys.stderr,
        check=True,
    )
    (run,) = set(_runs(storage)) - before
    return read(name, run)


def read(name: str, run: Path) -> Recording:
    """The recording of a finished run's folder."""
    rows = read_rows(run)
    return Recording(name, {f"{row['method']} + {row['score']}": numbers(row) for row in rows})


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.json`; where its layout changes, this and `numbers` follow."""
    return list(json.loads((run / "metrics.json").read_text())["rows"])


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row's figures: accuracies, AUROC and FPR by group, threshold, the score's parameters."""
    return {name: float(value) for name, value in _numbers(row) if value is not None}


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("id_accuracy", "ood_accuracy"):
        yield name, (row.get(name) or {}).get("mean")
    for metric in ("auroc", "fpr"):
        for group, value in row[metric].items():
            yield f"{metric}/{group}", value["mean"]
    yield "threshold", row["threshold"]["value"]
    for name, value in row["params"].items():
        yield f"params/{name}", value


def _runs(storage: Path) -> list[Path]:
    return [path.parent for path in (storage / "runs").glob("*/register.json")]
