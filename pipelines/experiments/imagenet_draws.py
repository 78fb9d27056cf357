"""400 known classes of ImageNet as the public harness of Zhu 2025's table draws them, stored.

The harness (CRoFT's) seeds numpy with the run's seed, 1, 2 or 3, and draws 400 of the class names
without replacement; the others are unknown. Here a draw is made once and kept as a list, so that
no run draws anything:

    python -m jobs.figures figure=imagenet_draws folder=conf/benchmark
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from pipelines.config import CONF

SEEDS = (1, 2, 3)
NUM_KNOWN = 400
# Classes that stand for the unknown in validation wherever they are not known: a third of all.
NUM_VALIDATION = 333
FILE = "imagenet_draws.json"
RULE = (
    "known_SEED: the places that numpy.random.RandomState(SEED).choice(1000, 400, replace=False) "
    "gives, in ascending order; numpy.random.seed(SEED) and numpy.random.choice(names, 400, "
    "replace=False) give the same names. Of two classes that the harness calls missile, or "
    "sunglasses, it makes both known where one is drawn; here only the one. validation_ood: the "
    "333 classes whose WordNet ids come first by sha256('imagenet-draws-v1/' + id)"
)


def run(folder: Path) -> str:
    """Write imagenet_draws.json; return what is in it."""
    folders: dict[str, str] = json.loads(
        (CONF / "benchmark" / "imagenet_classes.json").read_text()
    )["folders"]
    lists = {f"known_{seed}": draw(list(folders.values()), seed) for seed in SEEDS}
    lists["validation_ood"] = validation_classes(folders)
    content = {"version": 1, "source": "imagenet_classes.json", "rule": RULE, **lists}
    path = folder / FILE
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return f"{path}: " + ", ".join(f"{name} {len(names)}" for name, names in lists.items())


def draw(names: list[str], seed: int) -> list[str]:
    """The known classes of a seed, in the order of `names`."""
    places = np.random.RandomState(seed).choice(len(names), NUM_KNOWN, replace=False)
    return [names[place] for place in sorted(places.tolist())]


def validation_classes(folders: dict[str, str]) -> list[str]:
    """A third of the classes by the hash of their WordNet ids, in the order of `folders`."""

    def place(wordnet: str) -> str:
        return hashlib.sha256(f"imagenet-draws-v1/{wordnet}".encode()).hexdigest()

    first = set(sorted(folders, key=place)[:NUM_VALIDATION])
    return [name for wordnet, name in folders.items() if wordnet in first]
