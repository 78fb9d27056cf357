"""A sweep's cost: trainings as Ray Tune trials, everything else searched on arrays inside them.

On the embedded benchmark with Ray already started: 60 training settings, each judged by five
scores at 100 post-hoc settings; 10,000 post-hoc settings alone; what one more trial costs beyond
its own work. Beside them the plain way, one Tune trial a combination, of which a few are run and
the rest extrapolated: all of it would take hours.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import ray.tune

from pipelines import pipeline
from pipelines.backbones import network as backbones
from pipelines.compute.cluster import connect
from pipelines.config import load
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.score import search as posthoc
from pipelines.score.config import PostHocConfig
from pipelines.settings.config import PipelineConfig
from pipelines.speed.measure import Row
from pipelines.sweep import stage as sweep
from pipelines.sweep import tune
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.progress import Budget, Live
from pipelines.sweep.result import SweepResult
from pipelines.sweep.space import with_values
from pipelines.sweep.trial import Shared

SPACE = {
    "training.lr": [0.001, 0.002, 0.005, 0.01, 0.02],
    "weight": [0.25, 0.5, 1.0, 2.0],
    "keep": [0.25, 0.5, 0.75],
}
POSTHOC, ALONE = 100, 10_000
# Trials of the plain way that are run, and of the two sweeps whose difference is the overhead.
PLAIN, FEW, MANY = 24, 4, 24


def run(*, scale: float = 1.0) -> list[Row]:
    """The rows of `suite=sweep`.

    Args:
        scale: share of the trainings and of the post-hoc settings alone, in (0, 1].
    """
    with tempfile.TemporaryDirectory(prefix="energy-ood-") as folder, _benchmark(folder) as opened:
        return [
            *_two_levels(opened, scale),
            _posthoc_alone(opened, max(1, round(ALONE * scale))),
            _overhead(opened),
        ]


@contextmanager
def _benchmark(folder: str) -> Iterator[Run]:
    """The embedded benchmark's features, and Ray with its workers' imports warm."""
    words = [f"storage={folder}", "methods=[ebm]", "sweep=posthoc", "seeds=1"]
    config = load(PipelineConfig, "pipeline", words)
    with connect(config.compute):
        yield pipeline.run(config, Quiet(), only="embed")


def _sweep(opened: Run, space: Mapping[str, Sequence[float]], budget: int) -> SweepResult:
    settings = SweepConfig(posthoc=PostHocConfig(budget=budget), space={"ebm": dict(space)})
    config = opened.config
    inputs = sweep.Inputs(
        config.methods, config.scores, opened.sets, opened.backbone, opened.storage
    )
    result, _ = sweep.run(inputs, settings, compute=config.compute)
    return result


def _two_levels(opened: Run, scale: float) -> list[Row]:
    """60 trainings x 100 post-hoc settings, beside a time limit and beside the plain way."""
    space = {**SPACE, "training.lr": SPACE["training.lr"][: max(1, round(5 * scale))]}
    trainings = len(list(itertools.product(*space.values())))
    start = time.perf_counter()
    result = _sweep(opened, space, POSTHOC)
    seconds = time.perf_counter() - start
    assert {trial.status for trial in result.trials} == {"done"}
    name = f"sweep, {trainings} trainings x {POSTHOC} post-hoc settings of 5 scores"
    limit = 120.0 * trainings / 60
    plain = _plain_trial_seconds(opened) * trainings * POSTHOC
    note = f"extrapolated from {PLAIN} trials"
    return [
        Row(name, seconds, "limit", limit, seconds / limit, 1.0, "after Ray is up"),
        Row(name, seconds, "one trial a combination", plain, seconds / plain, None, note),
    ]


def _plain_trial_seconds(opened: Run) -> float:
    """Seconds that a trial takes which trains and judges one combination."""
    shared, method = _shared(opened), opened.config.methods["ebm"]
    values = list(itertools.product(*SPACE.values()))[:PLAIN]
    settings = [with_values(method, dict(zip(SPACE, v, strict=True))) for v in values]

    def trial(config: dict[str, int]) -> None:
        given: Shared = ray.get(features)
        trained = train_in_process(
            TrainingJob(settings[config["place"]], 0), given.data, given.load_backbone()
        )
        similarity = trained.predictor.similarity(given.validation.features)
        ood = {n: trained.predictor.similarity(s.features) for n, s in given.ood.items()}
        one = PostHocConfig(budget=1, c=[1])
        found = posthoc.search("delta_energy", similarity, ood, trained.predictor.logit_scale, one)
        ray.tune.report({"auroc": found[0].auroc})

    features = ray.put(shared)
    start = time.perf_counter()
    _fit(trial, len(settings), opened)
    return (time.perf_counter() - start) / len(settings)


def _fit(trial: Any, count: int, opened: Run) -> None:
    space = {"place": ray.tune.grid_search(list(range(count)))}
    results = tune.fit(
        trial, space, compute=opened.config.compute, budget=Budget(None), live=Live(count, None)
    )
    assert not results.errors


def _shared(opened: Run) -> Shared:
    view = opened.sets.for_training()
    return Shared(
        data=sweep.training_data(view),
        validation=view.load("validation"),
        ood={name: view.load(name) for name in view.names("validation_ood")},
        judged_on="validation_ood",
        backbone=opened.backbone,
        storage=opened.storage,
        scores=tuple(opened.config.scores),
        posthoc=opened.config.sweep.posthoc,
    )


def _posthoc_alone(opened: Run, count: int) -> Row:
    """Temperatures and c of DeltaEnergy on one head's similarities."""
    shared = _shared(opened)
    shared = replace(shared, posthoc=PostHocConfig(budget=count, c=[1, 2, 3, 4, 5]))
    clip = backbones.load(opened.backbone)
    trained = train_in_process(TrainingJob(opened.config.methods["ebm"], 0), shared.data, clip)
    predictor = trained.predictor
    known = predictor.similarity(shared.validation.features)
    ood = {n: predictor.similarity(s.features) for n, s in shared.ood.items()}
    start = time.perf_counter()
    found = posthoc.search("delta_energy", known, ood, predictor.logit_scale, shared.posthoc)
    seconds = time.perf_counter() - start
    images = len(known) + sum(map(len, ood.values()))
    name = f"{len(found):,} post-hoc settings alone, {images} validation images"
    limit = 10.0 * count / ALONE
    return Row(name, seconds, "limit", limit, seconds / limit, 1.0, "one thread")


def _overhead(opened: Run) -> Row:
    """What one more trial costs when there is nothing to do in it."""
    seconds = []
    for count in (FEW, MANY):
        start = time.perf_counter()
        _fit(_nothing, count, opened)
        seconds.append(time.perf_counter() - start)
    each = float(np.diff(seconds)[0]) / (MANY - FEW)
    note = f"{MANY} empty trials less {FEW}, over {MANY - FEW}"
    return Row("overhead of one more trial", each, "limit", 0.5, each / 0.5, 1.0, note)


def _nothing(config: dict[str, int]) -> None:  # noqa: ARG001
    ray.tune.report({"auroc": 0.0})
