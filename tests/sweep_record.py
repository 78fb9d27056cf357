"""A sweep's result and surfaces, made up from stated rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.methods import METHODS
from pipelines.sweep import surfaces
from pipelines.sweep.result import (
    Choice,
    ScoreFigures,
    ScoreParams,
    Settings,
    SweepResult,
    Trial,
)
from pipelines.sweep.surfaces import Row

SCORES = ("mcm", "delta_energy")
SURFACE = surfaces.schema(SCORES)


def figures(auroc: float, fpr: float, **params: float) -> ScoreFigures:
    return ScoreFigures(params=dict(params), auroc=auroc, fpr=fpr, tried=24)


def trial(method: str, number: int, settings: Settings, auroc: float) -> Trial:
    """A trial that is done; mcm gives two points less than the rule's AUROC."""
    return Trial(
        method=method,
        trial=number,
        settings=settings,
        status="done",
        accuracy=round(0.97 - (auroc - 0.9) / 4 - 0.01 * (7 * number % 11) / 10, 6),
        scores={
            "mcm": figures(auroc - 0.02, 1.02 - auroc, tau=1.0),
            "delta_energy": figures(auroc, 1 - auroc, tau=0.5, c=2),
        },
        seconds=2.0,
    )


def failed(method: str, number: int, settings: Settings, reason: str) -> Trial:
    """A trial that failed and has no figure."""
    return Trial(
        method=method,
        trial=number,
        settings=settings,
        status="failed",
        reason=reason,
        seconds=0.5,
    )


def sampled(num: int = 60) -> list[Trial]:
    """Random trials of `ebm`: lr matters most (best at 0.01), then weight; keep does nothing.

    The last two failed, the one before was stopped early.
    """
    random = np.random.default_rng(0)
    found = []
    for number in range(num):
        lr = float(f"{10 ** random.uniform(-4, 0):.3g}")
        weight = float(f"{random.uniform(0, 4):.3g}")
        keep = float(random.choice([0.25, 0.5, 1.0]))
        scope = str(random.choice(["image", "batch"]))
        rule = 0.95 - 0.03 * (math.log10(lr) + 2) ** 2 - 0.008 * abs(weight - 2)
        settings: Settings = {"training.lr": lr, "weight": weight, "keep": keep, "scope": scope}
        found.append(trial("ebm", number, settings, round(rule + random.normal(0, 0.003), 6)))
    stopped = {"status": "stopped", "reason": "stopped by ASHA after epoch 3"}
    found[-3] = found[-3].model_copy(update=stopped)
    found[-2:] = [
        failed("ebm", number, found[number].settings, "the loss became NaN in epoch 2")
        for number in (num - 2, num - 1)
    ]
    return found


def grid() -> list[Trial]:
    """A grid of `coop`: AUROC = 0.9 + 0.01 lr-step + 0.02 epoch-step, no more."""
    return [
        trial("coop", 3 * i + j, {"training.lr": lr, "training.epochs": epochs},
              0.9 + 0.01 * i + 0.02 * j)
        for i, lr in enumerate((0.001, 0.01, 0.1))
        for j, epochs in enumerate((10, 20, 30))
    ]  # fmt: skip


def surface(method: str, number: int) -> list[Row]:
    """delta_energy over tau and c, best at tau 0.5, c 2; mcm over tau, the better the larger."""
    rows: list[Row] = []
    for tau in np.geomspace(0.02, 5, 24):
        place: Row = {"method": method, "trial": number, "tau": float(tau)}
        for c in (1, 2, 3):
            auroc = 0.95 - 0.02 * math.log10(tau / 0.5) ** 2 - 0.01 * (c - 1.8) ** 2
            head: Row = {**place, "score": "delta_energy", "c": float(c)}
            rows.append({**head, "auroc": auroc, "fpr": 1 - auroc})
        auroc = 0.9 + 0.01 * math.log10(tau)
        rows.append({**place, "score": "mcm", "c": None, "auroc": auroc, "fpr": 1 - auroc})
    return rows


def choice(best: Trial, criterion: str, scores: dict[str, ScoreParams], **setting: Any) -> Choice:
    """A trial as the choice of its method."""
    return Choice(
        setting=METHODS[best.method].Config(score=criterion, **setting),
        chosen=best.settings,
        trial=best.trial,
        scores=scores,
        validation=best.scores,
        accuracy=best.accuracy,
    )


def result(methods: dict[str, Choice], trials: Sequence[Trial]) -> SweepResult:
    return SweepResult(
        criterion="made up",
        judged_on="validation_ood",
        budget=24,
        methods=methods,
        trials=tuple(trials),
    )


def record() -> tuple[SweepResult, pa.Table]:
    """`coop` on a grid, `ebm` on random samples, and the surfaces of what was chosen."""
    coop, ebm = grid(), sampled()
    done = [trial for trial in ebm if trial.status == "done"]
    chosen = {
        "coop": (coop[8], "mcm"),
        "ebm": (max(done, key=lambda t: t.scores["delta_energy"].auroc), "delta_energy"),
    }
    params: dict[str, ScoreParams] = {"delta_energy": {"tau": 0.48, "c": 2}, "mcm": {"tau": 5.0}}
    methods = {name: choice(best, criterion, params) for name, (best, criterion) in chosen.items()}
    rows = [row for name, (best, _) in chosen.items() for row in surface(name, best.trial)]
    return result(methods, [*coop, *ebm]), pa.Table.from_pylist(rows, SURFACE)
