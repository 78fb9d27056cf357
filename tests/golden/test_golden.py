"""The recorded numbers are still the numbers; a change that moves them records them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.methods import METHODS
from tests.golden import figures, one_epoch
from tests.golden.compare import compare, machine
from tests.golden.recording import FOLDER, Recording

RECORDED = Recording.read(FOLDER / f"{one_epoch.NAME}.json")
PRESETS = one_epoch.methods()


@pytest.fixture(scope="module")
def toy() -> one_epoch.Toy:
    return one_epoch.Toy.new()


def test_every_method_is_recorded() -> None:
    # linear_probe and the like are presets of cross_entropy.
    assert RECORDED.table.keys() == PRESETS.keys()
    # No head is trained by a classifier's own layer, nor by what only whole networks are.
    networks = {name for name, method in METHODS.items() if method.Config.needs_network}
    untrained = {"classifier", *networks}
    assert {method.name for method in PRESETS.values()} == METHODS.keys() - untrained


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_one_epoch_of_a_method_gives_the_recorded_numbers(name: str, toy: one_epoch.Toy) -> None:
    found = Recording("found", {name: one_epoch.numbers(PRESETS[name], toy)})
    expected = Recording("recorded", {name: RECORDED.table[name]})
    assert not list(map(str, compare(expected, found, machine)))


@pytest.mark.slow
def test_the_demo_gives_the_recorded_figures(tmp_path: Path) -> None:
    found = figures.record("demo", tmp_path)
    expected = Recording.read(FOLDER / "demo.json")
    assert not list(map(str, compare(expected, found, machine)))
