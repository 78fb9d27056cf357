"""What a training of networks refuses before any work: images with two purposes, wrong words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import ConfigError, UserError, load
from pipelines.data.benchmark_config import BenchmarkConfig
from pipelines.pipeline.networks import hand_train
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig, open_checked
from tests.small_network import short, write_network
from tests.train.test_stage import NEW

SCRATCH = "methods.network_outlier_exposure.head.train.start=random"
# Folders, each a source and a set.
SETS = {
    "train": ("cat", "dog"),
    "validation": ("cat", "dog"),
    "test": ("cat", "dog"),
    "outliers": ("bird",),
    "validation_ood/fish": ("fish",),
    "ood/far/rock": ("rock",),
}


def place(root: Path, name: str) -> Path:
    """The first image of a set."""
    return root / name.replace("/", "-") / SETS[name][0] / "00.png"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root, random = tmp_path / "images", np.random.default_rng(0)
    for name, classes in SETS.items():
        for class_name in classes:
            for number in range(2):
                path = place(root, name).parents[1] / class_name / f"{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return root


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Callable[..., Run]:
    """Opens a run on the folders; `left_out`: not_keys of the outliers."""
    words = [
        f"storage={tmp_path}/storage", "methods=[network_outlier_exposure]", SCRATCH,
        *short("network_outlier_exposure"), "scores=[energy]", "sweep=none", "shots=null",
        "seeds=1", "training=in_process",
    ]  # fmt: skip

    def opened(left_out: str = "") -> Run:
        # Opened without a classifier's file: the backbone has no weights.
        config = load(PipelineConfig, "pipeline", ["backbone=resnet20", *words])
        sources = {n: {"kind": "folder", "root": str(place(images, n).parents[1])} for n in SETS}
        named = {n.replace("/", "-"): source for n, source in sources.items()}
        sets: dict[str, dict[str, object]] = {n: {"source": n.replace("/", "-")} for n in SETS}
        if left_out:
            sets["outliers"]["not_keys"] = left_out
        benchmark = BenchmarkConfig.model_validate(
            {"name": "toy", "class_names": ["cat", "dog"], "sources": named, "sets": sets}
        )
        update = {"benchmark": benchmark, "backbone": NEW}
        return Run.open(config.model_copy(update=update), Quiet())

    return opened


def shared_with(name: str, images: Path) -> None:
    """Make the first image of a set an outlier too, by another name and in another format."""
    with Image.open(place(images, name)) as image:
        image.save(place(images, "outliers").with_name("innocent.bmp"))


def refused(run: Run) -> str:
    with pytest.raises(UserError) as caught:
        hand_train(run)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("name", ["train", "test", "ood/far/rock"])
def test_an_outlier_that_is_an_image_of_another_set_is_named(
    run: Callable[..., Run], images: Path, tmp_path: Path, name: str
) -> None:
    shared_with(name, images)
    line = refused(run())
    source, key = name.replace("/", "-"), f"{SETS[name][0]}/00.png"
    assert f"'outliers' and '{name}' share 1 image: bird/innocent.bmp of outliers is {key}" in line
    assert f"{key} of {source}" in line
    assert not (tmp_path / "storage" / "cache" / "networks").exists()


def test_who_leaves_the_named_outliers_out_is_trained(
    run: Callable[..., Run], images: Path, tmp_path: Path
) -> None:
    shared_with("test", images)
    file = refused(run()).partition("'benchmark.sets.outliers.not_keys=")[2].partition("'")[0]
    (network,) = hand_train(run(left_out=file)).networks
    assert (tmp_path / "storage" / "cache" / "networks" / network.address).is_dir()


def problems(folder: Path, *words: str) -> list[str]:
    """Everything that is wrong with a run on the digits."""
    every = [
        write_network(folder), "scores=[energy]", "sweep=none", f"storage={folder}", *words,
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        open_checked(load(PipelineConfig, "pipeline", every))
    return caught.value.problems


@pytest.mark.parametrize("name", ["network_energy", "network_balanced"])
def test_margins_in_the_wrong_order(tmp_path: Path, name: str) -> None:
    margins = (f"methods.{name}.m_in=-3", f"methods.{name}.m_out=-7")
    (line,) = problems(tmp_path, f"methods=[{name}]", *margins)
    assert line.startswith(f"methods.{name}: m_in=-3.0 must be below m_out=-7.0")


def test_a_network_of_other_classes(tmp_path: Path) -> None:
    other = "backbone.class_names=[zero, one, two, three, four, ten]"
    (line,) = problems(tmp_path, "methods=[network_energy]", other)
    assert "backbone seeded: its classifier has no class 'five' (1 unknown)" in line
    assert "it has 6: zero, one, two" in line
    # From scratch it gets the benchmark's classes.
    words = [write_network(tmp_path), other, "methods=[network_outlier_exposure]", SCRATCH]
    more = ["scores=[energy]", "sweep=none", f"storage={tmp_path}"]
    found = open_checked(load(PipelineConfig, "pipeline", [*words, *more]))
    assert found.class_names == ("zero", "one", "two", "three", "four", "five")


def test_a_start_that_is_no_network_of_the_run_or_goes_round(tmp_path: Path) -> None:
    names = ("network_energy", "network_outlier_exposure", "network_balanced")

    def started(**starts: str) -> list[str]:
        words = [f"methods.{name}.head.train.start={start}" for name, start in starts.items()]
        return problems(tmp_path, f"methods=[classifier,{','.join(names)}]", *words)

    for wrong in ("nowhere", "coop", "classifier", "network_energy"):
        (line,) = started(network_energy=wrong)
        assert line.startswith(f"methods.network_energy.head.train.start={wrong}: allowed are ")
        assert "backbone, random, or a method of the run that trains a network" in line
    lines = started(network_energy=names[1], network_outlier_exposure=names[0])
    assert [line.partition(".head")[0] for line in lines] == [f"methods.{n}" for n in names[:2]]
    lines = started(network_energy=names[1], **{names[1]: names[2], names[2]: names[0]})
    assert len(lines) == 3
