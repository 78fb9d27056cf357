"""A toy sweep: random clustered features, and what stands in Ray Tune's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.methods import METHODS, MethodConfig
from pipelines.records import SetName
from pipelines.sweep import known, worker
from pipelines.sweep import stage as sweep
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.result import ScoreFigures, SweepResult
from pipelines.sweep.spec import Spec
from pipelines.sweep.trial import Shared
from pipelines.sweep.trial_record import TrialRecord, keep_record
from tests.feature_cache import make_cache

CLASSES = ("cat", "dog", "cow")
SIZES = {
    "train": 18,
    "validation": 24,
    "test": 12,
    "outliers": 6,
    "shifted/x": 12,
    "validation_ood/a": 15,
    "validation_ood/b": 9,
    "ood/near/y": 12,
}
TRAINING = {"epochs": 2, "batch_size": 9, "warmup_epochs": 0, "lr": 0.05}
POSTHOC = {"budget": 4, "c": [1, 2]}


@pytest.fixture(scope="module")
def backbone(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    config, path = backbone_files["vit"]
    return BackboneConfig(name="tiny", config=str(config), path=str(path))


@pytest.fixture
def sets(tmp_path: Path) -> FeatureSets:
    """Random unit features, clustered by class; every set a shard of its own."""
    storage, random = Storage(str(tmp_path)), np.random.default_rng(0)
    centres = random.normal(size=(3, 16))
    chosen, caches = {}, {}
    for name, size in SIZES.items():
        source = name.replace("/", "-")
        known = SetName.parse(name).role in ("train", "validation", "test", "shifted")
        labels = [n % 3 if known else -1 for n in range(size)]
        rows = random.normal(size=(size, 16)) + (2 * centres[labels] if known else 0)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        keys = [f"{source}/{n:02d}" for n in range(size)]
        caches[source] = make_cache(storage, source, dict(zip(keys, rows, strict=True)))
        chosen[name] = Selection((source,) * size, tuple(keys), tuple(labels))
    benchmark = Benchmark("toy", CLASSES, ("a photo of a {}.",), "", {}, chosen, "address")
    return FeatureSets(benchmark, caches)


def method(name: str, **changes: Any) -> MethodConfig:
    settings: dict[str, Any] = {"training": TRAINING}
    if name != "zero_shot":
        settings["head"] = {"name": "coop", "num_context": 2}
    config: MethodConfig = METHODS[name].Config(**settings | changes)
    return config


def without(sets: FeatureSets, missing: str) -> FeatureSets:
    """The same features without the sets of a role."""
    left = {n: s for n, s in sets.benchmark.sets.items() if SetName.parse(n).role != missing}
    benchmark = Benchmark("toy", CLASSES, ("a photo of a {}.",), "", {}, left, "address")
    return FeatureSets(benchmark, sets.caches)


Tune = Callable[[Sequence[Spec], Shared], None]


@pytest.fixture
def tune_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tune], None]:
    """Puts something else in Ray Tune's place."""

    def use(function: Tune) -> None:
        def run_known(specs: Sequence[Spec], shared: Shared, **_: Any) -> dict[str, str]:
            function(specs, shared)
            return {}

        monkeypatch.setattr(known, "run_known", run_known)

    return use


def in_process(specs: Sequence[Spec], shared: Shared) -> None:
    """What the Tune workers do, one trial after the other."""
    for spec in specs:
        worker.run(spec, shared)


def made_up(results: Mapping[str, Sequence[tuple[float, dict[str, float]]]]) -> Tune:
    """Results by method and trial: accuracy and the best AUROC of each score."""

    def write(specs: Sequence[Spec], shared: Shared) -> None:
        for number, spec in enumerate(specs):
            accuracy, aurocs = results[spec.method][number]
            params = {"tau": float(number)}
            scores = {
                name: ScoreFigures(params=params, auroc=auroc, fpr=0.5, tried=4)
                for name, auroc in aurocs.items()
            }
            record = TrialRecord(status="done", accuracy=accuracy, scores=scores, best_epoch=1)
            keep_record(record, shared.storage, spec.address)

    return write


def run(
    methods: Mapping[str, MethodConfig],
    sets: FeatureSets,
    backbone: BackboneConfig,
    scores: Sequence[str] = ("mcm", "delta_energy"),
    **settings: Any,
) -> SweepResult:
    return run_with_surfaces(methods, sets, backbone, scores, **settings)[0]


def run_with_surfaces(
    methods: Mapping[str, MethodConfig],
    sets: FeatureSets,
    backbone: BackboneConfig,
    scores: Sequence[str] = ("mcm", "delta_energy"),
    **settings: Any,
) -> tuple[SweepResult, pa.Table | None]:
    storage = next(iter(sets.caches.values())).storage
    config = SweepConfig(posthoc=POSTHOC, **settings)
    inputs = sweep.Inputs(methods, scores, sets, backbone, storage)
    return sweep.run(inputs, config, compute=ComputeConfig())
