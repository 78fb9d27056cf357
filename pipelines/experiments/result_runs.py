"""Runs that `jobs.pipeline` left in ./outputs, read and joined: several benchmarks or domains.

A number of a group of runs is the mean over its runs; its standard deviation is over seeds, of
the mean over runs of each seed. An interval's ends are the means of the ends of each run and
seed, which is wide rather than narrow: neither runs nor seeds cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import ConfigError, load
from pipelines.evaluate.metrics import DifferenceMetric, Metrics
from pipelines.evaluate.scored import Scored, heads_of
from pipelines.ood import (
    Interval,
    ood_metrics,
    paired_accuracy_interval,
)
from pipelines.records import HeadKey, Role, SetName
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.score import stage as score
from pipelines.settings.config import PipelineConfig

NUM_RESAMPLES = 300


@dataclass(frozen=True)
class ResultRun:
    """One finished run: its metrics and the scores of its heads."""

    name: str
    metrics: Metrics
    heads: Mapping[HeadKey, Scored]

    @cached_property
    def ood(self) -> list[str]:
        """All OOD sets."""
        return next(iter(self.heads.values())).ood

    def seeds(self, method: str) -> list[Scored]:
        """The heads of a method, seed by seed."""
        return heads_of(self.heads, method)


def open_runs(words: Sequence[tuple[str, ...]]) -> tuple[list[ResultRun], list[str]]:
    """The finished runs of these words, and the commands of those that are missing.

    Raises:
        ConfigError: where none has been run, with the commands.
    """
    found, missing = [], []
    for line in words:
        run = Run.open(load(PipelineConfig, "pipeline", line), Quiet())
        if run.has("evaluate"):
            found.append(_result(run))
        else:
            missing.append(f"python -m jobs.pipeline {' '.join(line)}")
    if not found:
        raise ConfigError(["not in ./outputs yet; run first:", *missing])
    return found, missing


def _result(run: Run) -> ResultRun:
    config = run.config.benchmark
    name = config.name if config.held_out is None else f"{config.name} without {config.held_out}"
    heads = {key: Scored(table) for key, table in read_scores(run).items()}
    return ResultRun(name, run.metrics, heads)


def read_scores(run: Run) -> dict[HeadKey, pa.Table]:
    """The scores of every head under the chosen settings."""
    tables = score.read_all(run.storage, run.scored)
    return {key: table for key, table in tables.items() if key.variant == "chosen"}


@dataclass(frozen=True)
class Row:
    """The figures of one head under one score: (mean, std) as fractions."""

    method: str
    score: str
    figures: dict[str, tuple[float, float]]


COLUMNS = ("ID ACC", "OOD ACC", "AUROC", "FPR")


def rows(runs: Sequence[ResultRun]) -> list[Row]:
    """Zhu 2025's layout: every method by every score."""
    first = runs[0].metrics.rows
    return [Row(r.method, r.score, _figures(runs, r.method, r.score)) for r in first]


def _figures(runs: Sequence[ResultRun], method: str, name: str) -> dict[str, tuple[float, float]]:
    per_run = [[_of_head(head, name, run.ood) for head in run.seeds(method)] for run in runs]
    per_seed = np.mean(per_run, axis=0)
    means = np.mean(per_seed, axis=0)
    stds = np.std(per_seed, axis=0, ddof=1) if len(per_seed) > 1 else np.zeros(len(COLUMNS))
    values = zip(means, stds, strict=True)
    return {c: (float(m), float(s)) for c, (m, s) in zip(COLUMNS, values, strict=True)}


def _of_head(head: Scored, name: str, ood: Sequence[str]) -> list[float]:
    per_set = [ood_metrics(head.scores(name, "test"), head.scores(name, o)) for o in ood]
    return [
        head.accuracy("test"),
        float(np.mean([head.accuracy(set_name) for set_name in head.shifted])),
        float(np.mean([figures["auroc"] for figures in per_set])),
        float(np.mean([figures["fpr_at_tpr"] for figures in per_set])),
    ]


def accuracy_gain(runs: Sequence[ResultRun], method: str, other: str, role: Role) -> Interval:
    """Accuracy of `method` minus that of `other` on the sets of a role, paired by image."""

    def right(head: Scored) -> NDArray[np.bool_]:
        names = [name for name in head.sets if SetName.parse(name).role == role]
        return np.concatenate([head.correct(name) for name in names])

    return _paired(
        runs, method, other, lambda _, a, b: paired_accuracy_interval(right(a), right(b))
    )


def detection_gain(
    runs: Sequence[ResultRun],
    place: tuple[str, str],
    other: tuple[str, str],
    metric: DifferenceMetric,
) -> Interval:
    """A metric of (method, score) minus that of another pair, OOD images pooled."""

    def interval(run: ResultRun, first: Scored, second: Scored) -> Interval:
        after = first.resampled(metric, place[1], run.ood, NUM_RESAMPLES)
        return after.minus(second.resampled(metric, other[1], run.ood, NUM_RESAMPLES))

    return _paired(runs, place[0], other[0], interval)


def _paired(
    runs: Sequence[ResultRun],
    method: str,
    other: str,
    interval: Callable[[ResultRun, Scored, Scored], Interval],
) -> Interval:
    parts = [
        interval(run, a, b)
        for run in runs
        for a, b in zip(run.seeds(method), run.seeds(other), strict=True)
    ]
    return Interval.mean(parts)
