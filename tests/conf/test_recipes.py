"""The full recipes of the papers: they go together with images that lie where they say."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.config import CONF, load
from pipelines.data.benchmarks import Benchmark
from pipelines.settings.config import PipelineConfig, open_checked

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
# Training images of each class of CIFAR-10, and test images of each class of any set.
NUM_TRAIN, NUM_TEST = 250, 2
PRESETS = ("liu2020", "choi2023", "lafon2022", "results_cifar10_outliers")


def write(path: Path, classes: Sequence[str], first: Sequence[str] = ()) -> None:
    """A Parquet file of these classes, one picture for all; the keys `first` are of a bus."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(buffer, "PNG")
    keys, names, splits = list(first), ["bus"] * len(first), ["test"] * len(first)
    for name in classes:
        count = NUM_TRAIN if path.stem == "cifar10" else NUM_TEST
        for split, number in (("train", count), ("test", NUM_TEST)):
            keys += [f"{path.stem}/{split}/{name}/{n:04d}.png" for n in range(number)]
            names += [name] * number
            splits += [split] * number
    columns = {
        "key": keys, "image": [buffer.getvalue()] * len(keys), "class_name": names, "split": splits
    }  # fmt: skip
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the names that the benchmarks ask for."""
    folder = tmp_path_factory.mktemp("data")
    lists = json.loads((CONF / "benchmark" / "cifar10_overlap.json").read_text())
    tiny = [*lists["tinyimagenet_as_cifar10"], *lists["tinyimagenet_not_outliers"]]
    tiny += [*lists["tinyimagenet"], "police van", "umbrella"]
    write(folder / "cifar10.parquet", CLASSES)
    write(folder / "cifar100.parquet", ["bus"], lists["cifar100"])
    write(folder / "tinyimagenet.parquet", list(dict.fromkeys(tiny)))
    for name in ("dtd10", "scenes", "svhn", "places365", "lsun", "lsun_crop", "lsun_resize",
                 "isun", "300k_random_images"):  # fmt: skip
        write(folder / f"{name}.parquet", [f"a class of {name}"])
    return folder


def opened(preset: str, root: Path) -> tuple[PipelineConfig, Benchmark]:
    words = [f"preset={preset}", f"benchmark.root={root}"]
    if preset == "results_cifar10_outliers":  # starts from a file of weights with its classes
        words.append(f"backbone.path={root}/weights.safetensors")
    config = load(PipelineConfig, "pipeline", words)
    return config, open_checked(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_goes_together_with_its_images(preset: str, root: Path) -> None:
    config, benchmark = opened(preset, root)
    stored = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    assert list(config.methods) == stored["methods"]
    assert benchmark.class_names == CLASSES
    assert set(benchmark.sets["train"].labels) == set(range(10))
    learns = any(method.needs_outliers for method in config.methods.values())
    assert ("outliers" in benchmark.sets) == learns
    ood = [name for name in benchmark.sets if name.startswith("ood/")]
    assert len(ood) >= 3
    assert all(len(benchmark.sets[name]) for name in ood)


def test_the_recipe_of_choi_trains_on_a_long_tail(root: Path) -> None:
    _, benchmark = opened("choi2023", root)
    labels = benchmark.sets["train"].labels
    counts = [labels.count(label) for label in range(10)]
    assert counts[0] >= 100
    assert counts[9] == counts[0] // 100
    assert counts == [int(counts[0] * 0.01 ** (i / 9) + 1e-9) for i in range(10)]


def test_networks_of_a_recipe_start_where_the_paper_starts(root: Path) -> None:
    for preset in ("liu2020", "choi2023"):
        config, _ = opened(preset, root)
        starts = {name: m.network.start for name, m in config.methods.items() if m.network}
        assert starts.pop("network_cross_entropy") == "random"
        assert set(starts.values()) == {"network_cross_entropy"}
        margins = config.methods["network_energy"]
        assert (margins.m_in, margins.m_out) == (-23, -5)
