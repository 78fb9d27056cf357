"""The recipes of MCM, NegLabel and CSP, whole, on a tiny network and a few made-up pictures.

The networks and images that their published figures belong to are not here. What runs is the same
commands, and every figure is held against open_clip's own features and loops over floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from pipelines.config import CONF
from tests.ray.commands import job_here
from tests.wordnet_files import write_database

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CLASSES = {"n01440764": "tench", "n01443537": "goldfish"}
SETS = {"inaturalist": "iNaturalist", "sun": "SUN", "places": "Places", "textures": "dtd"}


def lines(words: str) -> str:
    return "\n".join(words.split()) + "\n"


# The farthest 15 % are chosen of nouns and of adjectives: three and two words, two without persons.
WORDS = {
    "noun.plant.txt": lines("oak fern moss pine elm rose ivy lily ash yew rye oat sedge reed"),
    "noun.person.txt": lines("baker sailor miller cook smith monk"),
    "adj.all.txt": lines("wooden red quiet old small round late cold loud thin dry wet odd raw"),
}
# A carp is beside the classes, and so is a dace, two levels down; koi is a kind of goldfish.
RELATIVES = {
    "animal": ("animal", ""),
    "cyprinid": ("cyprinid", "animal"),
    "tench": ("tench", "cyprinid"),
    "goldfish": ("goldfish", "cyprinid"),
    "koi": ("koi", "goldfish"),
    "carp": ("carp", "cyprinid"),
    "leuciscus": ("Leuciscus", "cyprinid"),
    "dace": ("dace", "leuciscus"),
    "oak": ("oak", "animal"),
}
Score = Callable[[list[float], list[float]], float]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as the archives of benchmark=imagenet_far unpack, every picture another one."""
    folder = tmp_path_factory.mktemp("far")
    random = np.random.default_rng(0)

    def pictures(place: Path, number: int) -> None:
        place.mkdir(parents=True)
        for n in range(number):
            pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).resize((40, 40)).save(place / f"{place.name}_{n}.JPEG")

    for wordnet in CLASSES:
        pictures(folder / "imagenet" / "train" / wordnet, 60)
        pictures(folder / "imagenet" / "val" / wordnet, 6)
    for name in SETS.values():
        pictures(folder / name / "images", 5)
    (folder / "words").mkdir()
    for name, content in WORDS.items():
        (folder / "words" / name).write_text(content)
    return folder


class Reference:
    """open_clip's own model of the tiny backbone."""

    def __init__(self, files: tuple[Path, Path]) -> None:
        self.model = open_clip.CLIP(**json.loads(files[0].read_text()))
        self.model.load_state_dict(load_file(files[1]))
        self.model.eval()
        self.tokens = open_clip.SimpleTokenizer(context_length=self.model.context_length)

    def images(self, *folders: Path) -> np.ndarray:
        """Unit features (N, D) of all pictures below the folders."""
        look = open_clip.image_transform(32, is_train=False)
        files = sorted(path for folder in folders for path in folder.rglob("*.JPEG"))
        with torch.no_grad():
            pixels = torch.stack([look(Image.open(path)) for path in files])
            return self.model.encode_image(pixels, normalize=True).double().numpy()

    def texts(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Unit features (N, D): per name the mean over its prompts."""
        rows = []
        for name in names:
            prompts = self.tokens([template.format(name) for template in templates])
            with torch.no_grad():
                mean = self.model.encode_text(prompts, normalize=True).double().mean(0).numpy()
            rows.append(mean / np.linalg.norm(mean))
        return np.stack(rows)


def mcm(cosines: list[float], _words: list[float]) -> float:
    return math.exp(max(cosines)) / sum(math.exp(s) for s in cosines)


def neg_label(cosines: list[float], words: list[float]) -> float:
    """Two groups of words in turn, tau 0.01: the mean share of the classes."""
    known = sum(math.exp(s / 0.01) for s in cosines)
    parts = [sum(math.exp(s / 0.01) for s in words[g::2]) for g in range(2)]
    return sum(known / (known + part) for part in parts) / 2


def auroc(known: list[float], unknown: list[float]) -> float:
    wins = [(k > u) + (k == u) / 2 for k in known for u in unknown]
    return sum(wins) / len(wins)


def fpr(known: list[float], unknown: list[float]) -> float:
    """The share of `unknown` kept where at least 95 % of `known` are."""
    threshold = sorted(known, reverse=True)[math.ceil(0.95 * len(known)) - 1]
    return sum(u >= threshold for u in unknown) / len(unknown)


@pytest.mark.parametrize(
    ("preset", "name", "score"),
    [("ming2022", "mcm", mcm), ("jiang2024", "neg_label", neg_label),
     ("chen2024", "neg_label", neg_label)],
)  # fmt: skip
def test_a_recipe_gives_the_figures_of_its_formula(
    preset: str,
    name: str,
    score: Score,
    root: Path,
    backbone_files: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    files = backbone_files["vit"]
    tiny = {"name": "tiny", "config": str(files[0]), "path": str(files[1])}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    words = [
        f"benchmark.root={root}", f"benchmark.class_names=[{', '.join(CLASSES.values())}]",
        f"backbone=@{tmp_path / 'tiny.yaml'}", f"storage={tmp_path / 'storage'}",
        f"negative_classes={root / 'words'}",
    ]  # fmt: skip
    if name == "neg_label":  # a hundred groups are more than the words here
        words.append("methods.zero_shot.score_params={neg_label: {tau: 0.01, groups: 2}}")
    done = job_here("pipeline", f"preset={preset}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "storage").glob("runs/*")
    (row,) = json.loads((folder / "metrics.json").read_text())["rows"]
    assert (row["method"], row["score"], row["is_criterion"]) == ("zero_shot", name, True)

    reference = Reference(files)
    templates = yaml.safe_load((CONF / f"{preset}.yaml").read_text())["benchmark.templates"]
    classes = reference.texts(list(CLASSES.values()), templates)
    negatives = classes[:0]
    for word in chosen_words(tmp_path) if name == "neg_label" else []:
        feature = reference.texts([word], own_templates(preset, word, templates))
        negatives = np.concatenate([negatives, feature])
    scores = {
        place: [score((z @ classes.T).tolist(), (z @ negatives.T).tolist()) for z in found]
        for place, found in {
            "test": reference.images(root / "imagenet" / "val"),
            **{key: reference.images(root / place) for key, place in SETS.items()},
        }.items()
    }
    for key in SETS:
        found = row["sets"][f"ood/far/{key}"]
        assert found["auroc"]["mean"] == pytest.approx(auroc(scores["test"], scores[key]))
        assert found["fpr"]["mean"] == pytest.approx(fpr(scores["test"], scores[key]))
    expected = sum(fpr(scores["test"], scores[key]) for key in SETS) / len(SETS)
    assert row["fpr"]["mean"]["mean"] == pytest.approx(expected)


def test_near_words_are_the_same_whatever_is_unknown(
    root: Path, backbone_files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The OOD sets of a benchmark have no part in its near words: one record for both runs."""
    config, path = backbone_files["vit"]
    tiny = {"name": "tiny", "config": str(config), "path": str(path)}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    words = [
        f"benchmark.root={root}", f"benchmark.class_names=[{', '.join(CLASSES.values())}]",
        f"backbone=@{tmp_path / 'tiny.yaml'}", f"storage={tmp_path / 'storage'}",
        f"negative_classes={write_database(tmp_path, RELATIVES)}", "negative_pool=near",
        "methods.zero_shot.score_params={neg_label: {tau: 0.01, groups: 2}}",
    ]  # fmt: skip
    without = [f"benchmark.sets.ood/far/{key}=null" for key in SETS if key != "sun"]
    for given in (words, words + without):
        done = job_here("pipeline", "preset=jiang2024", *given)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "storage").glob("runs/*"))) == 2
    assert manifest(tmp_path)["candidates"] == 3
    assert set(chosen_words(tmp_path)) <= {"carp", "Leuciscus", "dace"}


def manifest(folder: Path) -> dict[str, Any]:
    """Of the only record of words."""
    (path,) = (folder / "storage" / "cache" / "fitted").glob("*/manifest.json")
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def chosen_words(folder: Path) -> list[str]:
    return list(manifest(folder)["words"])


def own_templates(preset: str, word: str, templates: list[str]) -> list[str]:
    """Adjectives have prompts of their own; with CSP they are phrases of two words."""
    adjectives = WORDS["adj.all.txt"].split()
    if word in adjectives:
        return ["This is a {} photo"]
    if preset == "chen2024" and " " in word:
        return ["{}", "a nice photo of {}", "a good photo of {}", "a close-up photo of {}"]
    return templates
