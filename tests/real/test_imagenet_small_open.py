"""400 known classes of ImageNet on imagenet_small: who is in which set, for each draw."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.config import load
from pipelines.data.benchmarks import Benchmark, open_benchmark
from pipelines.data.stored_lists import read_list, read_names
from pipelines.settings.config import PipelineConfig

ID, SHIFTED = ("train", "validation", "test"), "shifted/caltech101"
CHOOSING, OOD = "validation_ood/other classes", "ood/near/other classes"
# Images of each set, as docs/results_imagenet.md has them.
SIZES = {
    1: {"train": 109, "validation": 57, "test": 227, SHIFTED: 399, CHOOSING: 187, OOD: 420},
    2: {"train": 103, "validation": 48, "test": 240, SHIFTED: 460, CHOOSING: 210, OOD: 399},
    3: {"train": 116, "validation": 58, "test": 225, SHIFTED: 499, CHOOSING: 165, OOD: 436},
}


@pytest.fixture
def folder(shared: Path) -> Path:
    for name in ("imagenet_small", "caltech101"):
        if not (shared / "data" / f"{name}.parquet").exists():
            pytest.skip(f"no {name} at {shared}")
    return shared / "data"


def opened(draw: int, folder: Path) -> Benchmark:
    words = [
        "benchmark=imagenet_small_open", f"benchmark.root={folder}", "sweep=none",
        f"benchmark.class_names=imagenet_draws.json#known_{draw}",
    ]  # fmt: skip
    return open_benchmark(load(PipelineConfig, "pipeline", words).benchmark)


def names_of(folder: Path) -> dict[str, str]:
    """The class of each photograph under ImageNet's name."""
    table = pq.read_table(folder / "imagenet_small.parquet", columns=["key", "class_name"])
    renamed = read_names("imagenet_small_names.json#names")
    rows = zip(table["key"].to_pylist(), table["class_name"].to_pylist(), strict=True)
    return {key: renamed.get(name, name) for key, name in rows}


@pytest.mark.parametrize("draw", SIZES)
def test_no_image_and_no_class_is_on_two_sides(draw: int, folder: Path) -> None:
    found = opened(draw, folder)
    assert {name: len(chosen) for name, chosen in found.sets.items()} == SIZES[draw]
    known = set(read_list(f"imagenet_draws.json#known_{draw}"))
    assert set(found.class_names) == known
    keys = Counter(key for chosen in found.sets.values() for key in chosen.keys)
    assert set(keys.values()) == {1}
    class_of = names_of(folder)
    seen = {name: {class_of[key] for key in found.sets[name].keys} for name in (*ID, CHOOSING, OOD)}
    for name in ID:
        assert seen[name] <= known
        labels = [found.class_names[label] for label in found.sets[name].labels]
        assert labels == [class_of[key] for key in found.sets[name].keys]
    assert not known & (seen[CHOOSING] | seen[OOD])
    assert not seen[CHOOSING] & seen[OOD]
    # Nothing is left out: every photograph is in one set.
    used = {key for name in (*ID, CHOOSING, OOD) for key in found.sets[name].keys}
    assert used == set(class_of)


def test_few_classes_have_a_training_image(folder: Path) -> None:
    for draw in SIZES:
        per_class = Counter(opened(draw, folder).sets["train"].labels)
        assert 75 < len(per_class) < 90
        assert max(per_class.values()) <= 5
