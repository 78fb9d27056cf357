"""A benchmark of random features on disk, clustered by class, its training set in two sources."""

from __future__ import annotations

import numpy as np

from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.records import SetName
from tests.feature_cache import make_cache

SIZES = {"train": 60, "validation": 30, "test": 12, "validation_ood/a": 24, "ood/near/y": 12}
CLASSES = ("cat", "dog", "cow")


def clustered_sets(storage: Storage, *, dim: int = 16, seed: int = 0) -> FeatureSets:
    """Unit features around one direction a class; OOD features around none."""
    random = np.random.default_rng(seed)
    centres = 3 * random.normal(size=(3, dim)) / dim**0.5
    chosen, caches = {}, {}
    for name, size in SIZES.items():
        known = SetName.parse(name).role in ("train", "validation", "test")
        labels = [n % 3 if known else -1 for n in range(size)]
        rows = random.normal(size=(size, dim)) / dim**0.5 + (2 * centres[labels] if known else 0)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        sources, keys = [], []
        # Two shards of unequal size, so that their statistics have to be merged.
        for part, picked in (("one", range(size // 3)), ("two", range(size // 3, size))):
            source = f"{name.replace('/', '-')}-{part}"
            own = [f"{source}/{n:02d}" for n in picked]
            content = dict(zip(own, rows[list(picked)], strict=True))
            caches[source] = make_cache(storage, source, content)
            sources += [source] * len(own)
            keys += own
        chosen[name] = Selection(tuple(sources), tuple(keys), tuple(labels))
    return FeatureSets(
        Benchmark("toy", CLASSES, ("a photo of a {}.",), "", {}, chosen, "address"), caches
    )
