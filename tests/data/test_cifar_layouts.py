"""The settings on CIFAR on small tables laid out as the public sets are: who is judged as what."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import CONF, UserError, load
from pipelines.data.benchmarks import Benchmark, open_benchmark
from pipelines.settings.config import PipelineConfig

CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
# The OOD sets of each layout, as the papers have them.
LAYOUTS = {
    "cifar10_liu": {
        "far": {"textures", "svhn", "places", "lsun_crop", "lsun_resize", "isun"},
    },
    "cifar10_lafon": {
        "near": {"cifar100", "tinyimagenet"}, "mid": {"lsun", "places"},
        "far": {"textures", "svhn"},
    },
    "cifar10_openood": {
        "near": {"cifar100", "tinyimagenet"}, "far": {"mnist", "svhn", "textures", "places"},
    },
    "cifar10_scood": {
        "near": {"cifar100", "tinyimagenet"}, "far": {"textures", "svhn", "lsun", "places"},
    },
}  # fmt: skip
FILES = ("dtd10", "svhn", "places365", "lsun", "lsun_crop", "lsun_resize", "isun", "mnist")
SHARED_IMAGE = "cifar100/test/bus/bus_s_000146.png"


def write(root: Path, file: str, rows: list[tuple[str, str, str]]) -> None:
    """A table of (key, class_name, split); images are opened by nobody here."""
    keys, names, splits = zip(*rows, strict=True)
    table = {"key": keys, "image": [k.encode() for k in keys], "class_name": names, "split": splits}
    pq.write_table(pa.table(table), root / f"{file}.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cifar")
    parts = [("train", n) for n in range(40)] + [("test", n) for n in range(3)]
    write(root, "cifar10", [(f"{s}/{c}/{n}", c, s) for c in CIFAR10 for s, n in parts])
    write(root, "cifar100", [("a/0", "apple", "test"), (SHARED_IMAGE, "bus", "test")])
    names = ("tabby", "moving van", "police van", "teapot")
    write(root, "tinyimagenet", [(f"t/{n}", n, "test") for n in names])
    for file in FILES:
        write(root, file, [(f"{file}/{n}", "some", "test") for n in range(2)])
    return root


def opened(name: str, root: Path, *words: str) -> Benchmark:
    base = ("backbone=cifar10_resnet20", "methods=[classifier]", "sweep=none", "shots=null")
    words = (*base, f"benchmark={name}", f"benchmark.root={root}", *words)
    return open_benchmark(load(PipelineConfig, "pipeline", words).benchmark)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_sets_of_its_paper(name: str, root: Path) -> None:
    found = opened(name, root)
    assert found.class_names == CIFAR10
    expected = {f"ood/{group}/{s}" for group, sets in LAYOUTS[name].items() for s in sets}
    assert set(found.names("ood")) == expected
    if "ood/near/cifar100" in expected:  # one image is in both data sets
        assert found.sets["ood/near/cifar100"].keys == ("a/0",)


def test_images_of_an_id_class_join_id_by_the_rule_of_sc_ood(root: Path) -> None:
    usual, by_rule = opened("cifar10_openood", root), opened("cifar10_scood", root)
    for found in (usual, by_rule):
        assert found.sets["ood/near/tinyimagenet"].keys == ("t/teapot",)
    assert Counter(usual.sets["test"].labels) == dict.fromkeys(range(10), 3)
    joined = by_rule.sets["test"]
    more = {
        key: CIFAR10[label]
        for source, key, label in zip(joined.sources, joined.keys, joined.labels, strict=True)
        if source == "tinyimagenet"
    }
    assert more == {"t/tabby": "cat", "t/moving van": "truck"}
    assert len(joined) == 30 + 2


def test_every_class_of_the_overlap_is_placed_or_left_out() -> None:
    stored = json.loads((CONF / "benchmark" / "cifar10_overlap.json").read_text())
    assert {*stored["tinyimagenet"]} - {*stored["tinyimagenet_as_cifar10"]} == {"police van"}
    assert {*stored["tinyimagenet_as_cifar10"]} < {*stored["tinyimagenet"]}
    assert {*stored["tinyimagenet_as_cifar10"].values()} <= {*CIFAR10}


def test_all_that_is_not_there_is_named_at_once_with_the_words_that_leave_it_out(
    root: Path, tmp_path: Path
) -> None:
    for file in root.iterdir():
        if file.stem not in ("svhn", "isun"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError) as error:
        opened("cifar10_liu", tmp_path)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "benchmark.sources.svhn", "benchmark.sources.isun",
    ]  # fmt: skip
    words = [line.rpartition("leave it out: ")[2].strip('"') for line in lines]
    found = opened("cifar10_liu", tmp_path, *words)
    assert len(found.names("ood")) == 4


def test_what_every_run_needs_is_not_offered_to_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, "dtd10", [("d/0", "some", "test")])
    left_out = [f"benchmark.sets.ood/far/{s}=null" for s in LAYOUTS["cifar10_liu"]["far"]]
    with pytest.raises(UserError, match=r"sources\.cifar10: nothing there.*root=DIR$"):
        opened("cifar10_liu", tmp_path, *left_out)


def test_cifar100_leaves_out_what_shows_its_classes(root: Path, tmp_path: Path) -> None:
    lists = json.loads((CONF / "benchmark" / "cifar100_classes.json").read_text())
    assert len(lists["names"]) == len(set(lists["names"])) == 100
    parts = [("train", n) for n in range(40)] + [("test", 0)]
    rows = [(f"{s}/{c}/{n}", c, s) for c in lists["names"] for s, n in parts]
    write(tmp_path, "cifar100", rows)
    write(tmp_path, "cifar10", [("c/0", "cat", "test"), (lists["cifar10"][0], "truck", "test")])
    write(tmp_path, "tinyimagenet", [("t/0", "school bus", "test"), ("t/1", "tabby", "test")])
    write(tmp_path, "dtd10", [("d/0", "banded", "test")])
    write(tmp_path, "scenes", [("s/0", "coast", "test"), ("s/1", "office", "test")])
    found = opened("cifar100", tmp_path)
    assert {name: found.sets[name].keys for name in found.names("ood")} == {
        "ood/near/cifar10": ("c/0",), "ood/near/tinyimagenet": ("t/1",),
        "ood/far/textures": ("d/0",), "ood/far/scenes": ("s/1",),
    }  # fmt: skip
