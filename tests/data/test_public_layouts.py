"""VLCS and the ImageNet settings on small trees laid out as the public sets are."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm.data

from pipelines.config import CONF, ConfigError, UserError, load
from pipelines.data.benchmarks import Benchmark, open_benchmark
from pipelines.settings.config import PipelineConfig

# Written down from ImageNet's own index: place, WordNet id, name.
TENCH, GOLDFISH, CRANE, BUILDING_CRANE = "n01440764", "n01443537", "n02012849", "n03126707"
PLACES = {TENCH: 0, GOLDFISH: 1, CRANE: 134, BUILDING_CRANE: 517}
NAMES = {TENCH: "tench", GOLDFISH: "goldfish", CRANE: "crane bird",
         BUILDING_CRANE: "construction crane"}  # fmt: skip


SIZES = itertools.count(1)


def touch(root: Path, *names: str, number: int = 1, end: str = "JPEG") -> None:
    """`number` files in each folder: what a set holds is decided by names alone.

    Of a size of their own: sets of equal names, sizes and times count as one.
    """
    content = b"x" * next(SIZES)
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for n in range(number):
            (root / name / f"{name.rpartition('/')[2]}_{n}.{end}").write_bytes(content)


def opened(name: str, root: Path, *words: str) -> Benchmark:
    words = (f"benchmark={name}", f"benchmark.root={root}", "sweep=none", *words)
    config = load(PipelineConfig, "pipeline", words)
    return open_benchmark(config.benchmark, shots=config.shots)


def classes(found: Benchmark, name: str) -> dict[str, str | None]:
    """The class name that each image of a set counts as."""
    chosen = found.sets[name]
    labels = [None if k < 0 else found.class_names[k] for k in chosen.labels]
    return dict(zip(chosen.keys, labels, strict=True))


def lists(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONF / "benchmark" / file).read_text())
    return content


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    touch(root / "imagenet" / "train", *PLACES, number=60)
    touch(root / "imagenet" / "val", *PLACES, number=2)
    touch(root / "imagenetv2-matched-frequency-format-val", *map(str, PLACES.values()))
    for style in ("sketch", "imagenet-a", "imagenet-r"):
        touch(root / style, TENCH, CRANE)
    touch(root / "ssb_hard", "n00001740")
    for flat in ("NINCO/amphiuma", "iNaturalist/images", "SUN/images", "Places/images"):
        touch(root, flat, end="jpg")
    touch(root / "dtd" / "images", "banded", "zigzagged", end="jpg")
    return root


@pytest.fixture(scope="module")
def found(imagenet: Path) -> Benchmark:
    return opened("imagenet", imagenet, f"benchmark.class_names=[{', '.join(NAMES.values())}]")


class TestImageNet:
    def test_a_folder_means_its_class_in_every_set(self, found: Benchmark) -> None:
        assert found.class_names == ("tench", "goldfish", "crane bird", "construction crane")
        for part, sets in (("train", ("train", "validation")), ("val", ("test",))):
            for name in sets:
                for key, label in classes(found, name).items():
                    top, wordnet, _ = key.split("/")
                    assert (top, NAMES[wordnet]) == (part, label)
        assert classes(found, "shifted/v2") == {
            f"{PLACES[i]}/{PLACES[i]}_0.JPEG": NAMES[i] for i in PLACES
        }
        for style in ("sketch", "a", "r"):
            assert classes(found, f"shifted/{style}") == {
                f"{i}/{i}_0.JPEG": NAMES[i] for i in (TENCH, CRANE)
            }

    def test_sixteen_shots_and_a_validation_part_of_their_own(self, found: Benchmark) -> None:
        assert Counter(found.sets["train"].labels) == dict.fromkeys(range(4), 16)
        validation = found.sets["validation"]
        assert set(validation.labels) == set(range(4))
        assert max(Counter(validation.labels).values()) <= 10
        assert not set(found.sets["train"].keys) & set(validation.keys)

    def test_the_other_makers_sets_are_ood_whatever_their_folders_are_called(
        self, found: Benchmark
    ) -> None:
        sizes = {name: len(found.sets[name]) for name in found.names("ood")}
        assert sizes == {
            "ood/near/ssb_hard": 1, "ood/near/ninco": 1, "ood/far/inaturalist": 1,
            "ood/far/sun": 1, "ood/far/places": 1, "ood/far/textures": 2,
        }  # fmt: skip

    def test_an_imagenet_class_among_ssb_hard_is_refused(
        self, imagenet: Path, tmp_path: Path
    ) -> None:
        names = f"benchmark.class_names=[{', '.join(NAMES.values())}]"
        touch(tmp_path / "ssb_hard", TENCH)
        with pytest.raises(UserError, match="its class tench is an ID class"):
            opened(
                "imagenet", imagenet, names, f"benchmark.sources.ssb_hard.root={tmp_path}/ssb_hard"
            )

    def test_what_is_not_there_is_left_out_by_a_word(self, imagenet: Path) -> None:
        names = f"benchmark.class_names=[{', '.join(NAMES.values())}]"
        missing = f"benchmark.sources.sun.root={imagenet}/nowhere"
        with pytest.raises(UserError, match=r"benchmark\.sources\.sun: nothing there"):
            opened("imagenet", imagenet, names, missing)
        found = opened("imagenet", imagenet, names, missing, "benchmark.sets.ood/far/sun=null")
        assert "ood/far/sun" not in found.sets

    def test_the_far_sets_alone_with_an_image_a_class_to_start_from(self, imagenet: Path) -> None:
        names = f"benchmark.class_names=[{', '.join(NAMES.values())}]"
        found = opened("imagenet_far", imagenet, names, "shots=null")
        for part in ("train", "validation"):
            assert Counter(found.sets[part].labels) == dict.fromkeys(range(4), 1)
        assert Counter(found.sets["test"].labels) == dict.fromkeys(range(4), 2)
        others = ("inaturalist", "sun", "places", "textures")
        assert found.names("ood") == [f"ood/far/{name}" for name in others]

    def test_all_thousand_classes_are_asked_for(self, imagenet: Path) -> None:
        with pytest.raises(UserError, match=r"no image of class great white shark.* 976 more$"):
            opened("imagenet", imagenet)


def test_imagenet_open_splits_the_classes_and_restricts_the_shifted_sets(tmp_path: Path) -> None:
    stored, wordnet = lists("imagenet_open_split.json"), lists("imagenet_classes.json")["folders"]
    ids = {name: i for i, name in wordnet.items()}
    known, other = stored["id"][:3], stored["ood"][:2]
    folders = [ids[name] for name in (*known, *other)]
    touch(tmp_path / "imagenet" / "train", *folders, number=60)
    touch(tmp_path / "imagenet" / "val", *folders, number=2)
    every = list(wordnet)
    touch(
        tmp_path / "imagenetv2-matched-frequency-format-val",
        *(str(every.index(i)) for i in folders),
    )
    for style in ("sketch", "imagenet-a", "imagenet-r"):
        touch(tmp_path / style, *folders)
    found = opened("imagenet_open", tmp_path, f"benchmark.class_names=[{', '.join(known)}]")
    for name in ("train", "validation", "test", "shifted/v2", "shifted/sketch", "shifted/a"):
        assert set(classes(found, name).values()) == set(known)
    assert set(classes(found, "ood/near/other classes")) == {
        f"val/{ids[name]}/{ids[name]}_{n}.JPEG" for name in other for n in range(2)
    }


def test_the_thousand_names_are_unique_and_those_of_clip() -> None:
    stored = lists("imagenet_classes.json")
    assert list(stored["folders"].values()) == stored["names"]
    assert len(set(stored["names"])) == 1000
    own = Path(timm.data.__file__).parent / "_info" / "imagenet_synsets.txt"
    assert list(stored["folders"]) == own.read_text().split()
    differing = {
        i: (theirs, ours)
        for (i, ours), theirs in zip(
            stored["folders"].items(), open_clip.IMAGENET_CLASSNAMES, strict=True
        )
        if theirs != ours
    }
    assert differing == {
        "n04008634": ("missile", "projectile"),
        "n04355933": ("sunglasses", "sunglass"),
    }


def test_the_open_split_is_what_its_rule_says() -> None:
    stored, names = lists("imagenet_open_split.json"), lists("imagenet_classes.json")["folders"]

    def place(wordnet: str) -> str:
        return hashlib.sha256(f"imagenet-open-v1/{wordnet}".encode()).hexdigest()

    last = sorted(map(place, names))[399]
    assert stored["id"] == [name for i, name in names.items() if place(i) <= last]
    assert stored["ood"] == [name for i, name in names.items() if place(i) > last]
    assert (len(stored["id"]), len(stored["ood"])) == (400, 600)


class TestVLCS:
    CALTECH = ("car_side", "Faces", "BACKGROUND_Google", "soccer_ball", "Motorbikes")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        sizes = {"train": 20, "crossval": 2, "test": 3}
        for domain in ("CALTECH", "LABELME", "PASCAL", "SUN"):
            for part, number in sizes.items():
                touch(tmp_path / "VLCS" / domain / part, *"01234", number=number, end="jpg")
        split = lists("vlcs_split.json")
        some = [split[part][0] for part in ("outliers", "validation_ood", "test_ood")]
        touch(tmp_path / "caltech101", *some, *self.CALTECH, number=20, end="jpg")
        return tmp_path

    @pytest.mark.parametrize("held_out", ["sun", "caltech"])
    def test_domains_parts_and_numbered_classes(self, root: Path, held_out: str) -> None:
        found = opened("vlcs", root, f"benchmark.held_out={held_out}")
        names = ("bird", "car", "chair", "dog", "person")
        assert found.class_names == names
        for name, part in (
            ("train", "train"), ("validation", "crossval"), ("test", "test"),
            ("shifted/held out domain", "test"),
        ):  # fmt: skip
            chosen = found.sets[name]
            for key, label in classes(found, name).items():
                top, number, _ = key.split("/")
                assert (top, names[int(number)]) == (part, label)
            others = {"caltech", "labelme", "pascal", "sun"} - {held_out}
            assert set(chosen.sources) == ({held_out} if name.startswith("shifted") else others)
        assert Counter(found.sets["train"].labels) == dict.fromkeys(range(5), 16)

    def test_caltechs_folders_by_their_own_names(self, root: Path) -> None:
        found = opened("vlcs", root)
        split = lists("vlcs_split.json")
        seen = {
            name: {key.partition("/")[0] for key in found.sets[name].keys}
            for name in ("outliers", "validation_ood/caltech101", "ood/far/caltech101")
        }
        public = {"Faces", "car_side", "BACKGROUND_Google"}  # in no list
        assert not public & set.union(*seen.values())
        held = {
            part: {f for f in ("soccer_ball", "Motorbikes") if f.lower().replace("_", " ") in names}
            for part, names in split.items()
            if isinstance(names, list)
        }
        assert {*held["outliers"], split["outliers"][0]} == seen["outliers"]
        assert {*held["validation_ood"], split["validation_ood"][0]} == seen[
            "validation_ood/caltech101"
        ]
        assert {*held["test_ood"], split["test_ood"][0]} == seen["ood/far/caltech101"]

    def test_the_lists_leave_out_what_vlcs_shows(self) -> None:
        split = lists("vlcs_split.json")
        left_out = {*split["overlap_with_vlcs"], *split["ambiguous_left_out"]}
        parts = [set(split[part]) for part in ("outliers", "validation_ood", "test_ood")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 86
        assert not left_out & set.union(*parts)
        assert {"car side", "chair", "faces", "ibis", "dalmatian"} <= left_out


def test_a_class_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no list 'nothing' in imagenet_classes\.json"):
        opened("imagenet", tmp_path, "benchmark.class_names=imagenet_classes.json#nothing")
