"""The stored draws of 400 known classes: what the public harness draws, kept by one command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipelines import experiments as figures
from pipelines.config import CONF

STORED = CONF / "benchmark" / "imagenet_draws.json"
CLASSES = json.loads((CONF / "benchmark" / "imagenet_classes.json").read_text())


def test_the_command_writes_the_stored_file(tmp_path: Path) -> None:
    said = figures.run("imagenet_draws", tmp_path)
    assert (tmp_path / STORED.name).read_bytes() == STORED.read_bytes()
    assert said.endswith("known_1 400, known_2 400, known_3 400, validation_ood 333")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_draw_is_that_of_the_public_harness(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002 - the harness's own two calls
    drawn = np.random.choice(CLASSES["names"], 400, replace=False)  # noqa: NPY002
    stored = json.loads(STORED.read_text())[f"known_{seed}"]
    assert set(stored) == set(drawn.tolist())
    assert len(stored) == len(set(stored)) == 400
    assert stored == [name for name in CLASSES["names"] if name in set(stored)]


def test_the_draws_differ() -> None:
    stored = json.loads(STORED.read_text())
    first, second, third = (set(stored[f"known_{seed}"]) for seed in (1, 2, 3))
    # Of two draws of 400 among 1,000, about 160 are common.
    for one, other in ((first, second), (first, third), (second, third)):
        assert 120 < len(one & other) < 200


def test_a_third_of_the_classes_stand_for_the_unknown_in_validation() -> None:
    def place(wordnet: str) -> str:
        return hashlib.sha256(f"imagenet-draws-v1/{wordnet}".encode()).hexdigest()

    last = sorted(map(place, CLASSES["folders"]))[332]
    expected = [name for wordnet, name in CLASSES["folders"].items() if place(wordnet) <= last]
    assert json.loads(STORED.read_text())["validation_ood"] == expected
