"""Sets chosen by stored rules, and one clear message for each mistake."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines import config
from pipelines.config import UserError, compose
from pipelines.data.benchmark_config import BenchmarkConfig
from pipelines.data.benchmarks import Benchmark, open_benchmark
from pipelines.data.schema import NO_LABEL
from pipelines.records import SetName

ID = ("cat", "dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Empty JPEG files: photo/{cat,dog}, sketch/{cat,dog}, other/{bird,fish}, 40 of each."""
    for place in ("photo/cat", "photo/dog", "sketch/cat", "sketch/dog", "other/bird", "other/fish"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(40):
            (tmp_path / place / f"{number:02d}.jpg").touch()
    return tmp_path


def sources(folder: Path) -> dict[str, Any]:
    return {
        "photo": {"kind": "folder", "root": str(folder / "photo"), "domain": "photo"},
        "sketch": {"kind": "folder", "root": str(folder / "sketch"), "domain": "sketch"},
        "other": {"kind": "folder", "root": str(folder / "other")},
    }


def described(folder: Path, **changes: Any) -> BenchmarkConfig:
    """A small benchmark; `changes` replace parts of it, sets are merged by name."""
    content: dict[str, Any] = {
        "name": "toy",
        "class_names": list(ID),
        "sources": sources(folder),
        "sets": {
            "train": {"source": "photo", "splits": ["train"], "fraction": [0, 0.5]},
            "validation": {"source": "photo", "splits": ["train"], "fraction": [0.5, 1]},
            "test": {"source": "photo", "splits": ["test"]},
            "shifted/sketch": {"source": "sketch"},
            "validation_ood/bird": {"source": "other", "classes": "bird"},
            "ood/far/fish": {"source": "other", "classes": ["fish"]},
        },
    }
    content["sets"] |= changes.pop("sets", {})
    content["sets"] = {name: chosen for name, chosen in content["sets"].items() if chosen}
    return BenchmarkConfig.model_validate({**content, **changes})


def mistake(settings: BenchmarkConfig, shots: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_benchmark(settings, shots=shots)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


class TestSets:
    def test_conditions_choose_the_members(self, folder: Path) -> None:
        found = open_benchmark(described(folder))
        parts = [set(found.sets[name].keys) for name in ("train", "validation", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 80
        assert all(len(part) > 5 for part in parts)
        assert len(found.sets["shifted/sketch"]) == 80
        fish = found.sets["ood/far/fish"]
        assert {key.partition("/")[0] for key in fish.keys} == {"fish"}
        assert set(fish.labels) == {NO_LABEL}

    def test_labels_are_the_places_in_class_names(self, folder: Path) -> None:
        for names in (["cat", "dog"], ["dog", "cat"]):
            found = open_benchmark(described(folder, class_names=names)).sets["test"]
            for key, label in zip(found.keys, found.labels, strict=True):
                assert key.startswith(f"{names[label]}/")

    def test_a_drawn_split_is_about_four_to_one_and_by_the_key(self, folder: Path) -> None:
        first = open_benchmark(described(folder)).sets["test"].keys
        assert 4 <= len(first) <= 28  # 80 images at 0.2: 16, more than 3 sigma either way
        (folder / "photo" / "cat" / "more.jpg").touch()
        second = open_benchmark(described(folder)).sets["test"].keys
        assert set(second) - {"cat/more.jpg"} == set(first)

    def test_shots_take_as_many_of_each_class_and_domain(self, folder: Path) -> None:
        both = {"source": ["photo", "sketch"], "splits": ["train"], "fraction": [0, 0.5]}
        settings = described(folder, sets={"train": both, "shifted/sketch": None})
        found = open_benchmark(settings, shots=6).sets["train"]
        counts = Counter(zip(found.sources, found.labels, strict=True))
        assert counts == {(s, k): 3 for s in ("photo", "sketch") for k in (0, 1)}
        more = open_benchmark(settings, shots=8).sets["train"]
        assert set(zip(found.sources, found.keys, strict=True)) < set(
            zip(more.sources, more.keys, strict=True)
        )

    def test_per_class_is_an_upper_bound(self, folder: Path) -> None:
        chosen = {"source": "other", "classes": ["fish"], "per_class": 7}
        found = open_benchmark(described(folder, sets={"ood/far/fish": chosen}))
        assert len(found.sets["ood/far/fish"]) == 7
        chosen["per_class"] = 700
        found = open_benchmark(described(folder, sets={"ood/far/fish": chosen}))
        assert len(found.sets["ood/far/fish"]) == 40

    def test_splits_of_the_source_count(self, folder: Path) -> None:
        kinds = [("cat", "train"), ("dog", "train"), ("cat", "test"), ("dog", "test")] * 5
        rows = [(f"{n:02d}.jpg", *kind) for n, kind in enumerate(kinds)]
        columns = dict(zip(("key", "class_name", "split"), zip(*rows, strict=True), strict=True))
        table = pa.table({**columns, "image": [b""] * len(rows)})
        pq.write_table(table, folder / "own.parquet")
        own = {**sources(folder), "photo": {"kind": "parquet", "root": str(folder / "own.parquet")}}
        sets = {"train": {"source": "photo", "splits": ["train"]}, "validation": None}
        found = open_benchmark(described(folder, sources=own, sets=sets))
        assert found.sets["test"].keys == tuple(r[0] for r in rows if r[2] == "test")

    def test_lists_in_a_file(self, folder: Path) -> None:
        file = folder / "lists.json"
        file.write_text(json.dumps({"seen": ["bird"], "known": ["cat", "dog"]}))
        sets = {
            "validation_ood/bird": {"source": "other", "classes": f"{file}#seen"},
            "ood/far/fish": {"source": "other", "not_classes": [f"{file}#seen"]},
        }
        found = open_benchmark(described(folder, sets=sets)).sets
        assert {k.partition("/")[0] for k in found["validation_ood/bird"].keys} == {"bird"}
        assert {k.partition("/")[0] for k in found["ood/far/fish"].keys} == {"fish"}

    def test_images_are_left_out_by_key(self, folder: Path) -> None:
        file = folder / "lists.json"
        file.write_text(json.dumps({"ood/far/fish": ["fish/03.jpg", "fish/04.jpg"]}))
        chosen = {"source": "other", "classes": ["fish"], "not_keys": f"{file}#ood/far/fish"}
        found = open_benchmark(described(folder, sets={"ood/far/fish": chosen}))
        left = {f"fish/{n:02d}.jpg" for n in range(40) if n not in (3, 4)}
        assert set(found.sets["ood/far/fish"].keys) == left

    def test_a_set_of_null_is_none_and_its_source_is_not_looked_for(self, folder: Path) -> None:
        own = {**sources(folder), "gone": {"kind": "folder", "root": str(folder / "gone")}}
        settings = described(folder, sources=own)
        plain = settings.model_dump()
        plain["sets"] |= {"ood/far/gone": None}
        found = open_benchmark(BenchmarkConfig.model_validate(plain))
        assert list(found.sets) == list(settings.sets)

    def test_keys_by_source_are_all_that_is_needed(self, folder: Path) -> None:
        found = open_benchmark(described(folder), shots=2)
        keys = found.keys_by_source()
        assert {s: len(k) for s, k in keys.items()} == {
            "photo": 4 + len(found.sets["validation"]) + len(found.sets["test"]),
            "sketch": 80,
            "other": 80,
        }
        assert all(k == sorted(set(k)) for k in keys.values())

    def test_the_first_source_that_is_there(self, folder: Path) -> None:
        listed = [{"kind": "parquet", "root": str(folder / "no.parquet")}, sources(folder)["photo"]]
        settings = described(folder, sources={**sources(folder), "photo": listed})
        assert len(open_benchmark(settings).sets["test"])

    def test_the_address_follows_members_classes_and_templates(self, folder: Path) -> None:
        first = open_benchmark(described(folder)).address
        assert open_benchmark(described(folder)).address == first
        others = [
            open_benchmark(described(folder), shots=2),
            open_benchmark(described(folder, class_names=["dog", "cat"])),
            open_benchmark(described(folder, templates=["{}"])),
        ]
        (folder / "other" / "fish" / "00.jpg").write_bytes(b"changed")
        others.append(open_benchmark(described(folder)))
        assert len({first, *(o.address for o in others)}) == 5


class TestMistakes:
    def test_an_empty_folder(self, folder: Path) -> None:
        (folder / "empty").mkdir()
        own = {**sources(folder), "photo": {"kind": "folder", "root": str(folder / "empty")}}
        message = mistake(described(folder, sources=own))
        assert message.startswith(f"{folder / 'empty'}: no image here")
        assert ".jpg" in message

    def test_a_missing_folder(self, folder: Path) -> None:
        own = {**sources(folder), "photo": {"kind": "folder", "root": str(folder / "gone")}}
        message = mistake(described(folder, sources=own))
        assert message.startswith("benchmark.sources.photo: nothing there")
        assert str(folder / "gone") in message
        assert "benchmark.root=DIR" in message

    def test_a_class_without_an_image(self, folder: Path) -> None:
        sets = {"shifted/sketch": None}
        message = mistake(described(folder, class_names=["cat", "dog", "emu"], sets=sets))
        assert message == "set 'train' of benchmark 'toy': no image of class emu"

    def test_a_benchmark_may_say_that_it_shows_only_some_classes(self, folder: Path) -> None:
        changes = {"class_names": ["cat", "dog", "emu"], "sets": {"shifted/sketch": None}}
        found = open_benchmark(described(folder, **changes, every_class=False))
        assert set(found.sets["train"].labels) == set(found.sets["test"].labels) == {0, 1}

    def test_a_label_outside_the_class_list(self, folder: Path) -> None:
        (folder / "photo" / "cow").mkdir()
        for number in range(40):
            (folder / "photo" / "cow" / f"{number:02d}.jpg").touch()
        message = mistake(described(folder))
        assert message.startswith("set 'train': cow/")
        assert "has the class 'cow', which is not in class_names (cat, dog)" in message

    def test_an_ood_set_of_an_id_class(self, folder: Path) -> None:
        for number in range(3):
            path = folder / "other" / "dog" / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        sets = {"ood/far/fish": {"source": "other", "not_classes": ["bird"]}}
        message = mistake(described(folder, sets=sets))
        assert message.startswith("set 'ood/far/fish': its class dog is an ID class")
        assert "not_classes" in message

    def test_an_image_in_two_sets(self, folder: Path) -> None:
        sets = {"shifted/again": {"source": "photo", "classes": ["cat"], "splits": ["test"]}}
        message = mistake(described(folder, sets=sets))
        assert message.startswith("benchmark 'toy': cat/")
        assert message.endswith("is in 'test' and in 'shifted/again'; sets must not share images")

    def test_an_ood_set_of_id_images_under_another_class_name(self, folder: Path) -> None:
        listed = folder / "listed.parquet"
        names = ["cat", "dog", "feline"] * 10
        keys = [f"{n:02d}" for n in range(29)] + ["00"]  # the last row is the first image again
        splits = ["test"] * 30
        table = {"key": keys, "class_name": names, "split": splits, "image": [b""] * 30}
        pq.write_table(pa.table(table), listed)
        own = {**sources(folder), "photo": {"kind": "parquet", "root": str(listed)}}
        sets = {
            "train": None,
            "validation": None,
            "test": {"source": "photo", "classes": "id"},
            "ood/near/feline": {"source": "photo", "classes": ["feline"]},
        }
        message = mistake(described(folder, sources=own, sets=sets))
        assert message.startswith(f"{listed}: 1 keys stand there more than once (first: 00);")

    def test_the_same_images_by_the_name_of_another_source(self, folder: Path) -> None:
        own = {**sources(folder), "copy": sources(folder)["photo"]}
        sets = {"shifted/copy": {"source": "copy", "splits": ["test"]}}
        message = mistake(described(folder, sources=own, sets=sets))
        assert "is in 'test' and in 'shifted/copy'" in message

    @pytest.mark.parametrize("first", ["outliers", "validation_ood/fish"])
    def test_a_test_class_seen_before(self, folder: Path, first: str) -> None:
        fish = {"source": "other", "classes": ["fish"]}
        sets = {
            first: {**fish, "fraction": [0, 0.5]},
            "ood/far/fish": {**fish, "fraction": [0.5, 1]},
        }
        message = mistake(described(folder, sets=sets))
        assert message == (
            f"benchmark 'toy': {first!r} and 'ood/far/fish' share the class fish; a test set "
            "must show classes never seen before"
        )

    def test_conditions_that_nothing_fits(self, folder: Path) -> None:
        sets = {"ood/far/fish": {"source": "other", "classes": ["whale"]}}
        message = mistake(described(folder, sets=sets))
        assert message == "set 'ood/far/fish' of benchmark 'toy': no image fits its conditions"

    def test_more_shots_than_there_are(self, folder: Path) -> None:
        message = mistake(described(folder), shots=1000)
        assert message.startswith("shots=1000: more than there are (cat: ")
        assert message.endswith("shots=null takes all")

    def test_a_list_that_is_not_in_the_file(self, folder: Path) -> None:
        sets = {"ood/far/fish": {"source": "other", "classes": "pacs_ood_split.json#nothing"}}
        message = mistake(described(folder, sets=sets))
        assert message == "set 'ood/far/fish': no list 'nothing' in pacs_ood_split.json"

    def test_a_list_file_that_cannot_be_read(self, folder: Path) -> None:
        (folder / "lists.json").write_text("{")
        sets = {"ood/far/fish": {"source": "other", "classes": f"{folder}/lists.json#seen"}}
        assert "lists.json is not readable as JSON" in mistake(described(folder, sets=sets))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"class_names": ["cat", "dog", "cat"]}, "cat stands there twice"),
            ({"templates": ["a photo"]}, "needs {} once"),
            ({"templates": ["{} and {}"]}, "needs {} once"),
            ({"class_names": ["cat"]}, "at least 2 items"),
            ({"sets": {"test": {"source": "elsewhere"}}}, "no source 'elsewhere'; allowed: photo"),
            ({"sets": {"near/x": {"source": "photo"}}}, "a name starts with one of train"),
            (
                {"sets": {"ood": {"source": "photo"}}},
                "set 'ood': an OOD set is written ood/GROUP/NAME",
            ),
            (
                {"sets": {"ood/x": {"source": "photo"}}},
                "set 'ood/x': an OOD set is written ood/GROUP/NAME",
            ),
            ({"sets": {"test": None}}, "needs the set 'test'"),
            ({"sets": {"test": {"source": "photo", "per_class": 0}}}, "greater than or equal to 1"),
        ],
    )
    def test_a_description_that_cannot_be(
        self, folder: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValidationError) as caught:
            described(folder, **changes)
        assert message in str(caught.value)


def digits() -> Benchmark:
    data, problems = compose("pipeline", ["benchmark=digits"])
    assert not problems
    return open_benchmark(BenchmarkConfig.model_validate(data["benchmark"]), shots=16)


def test_the_digits_benchmark_is_what_its_row_in_the_protocols_says() -> None:
    found = digits()
    stored = json.loads((config.CONF / "benchmark" / "digits_split.json").read_text())
    part = {index: name for name in ("train", "validation", "test") for index in stored[name]}
    styles = {
        name: {key.split("/")[2] for key in chosen.keys if key.startswith("digits/")}
        for name, chosen in found.sets.items()
    }
    parts = {
        name: {part[int(key.split("/")[1])] for key in chosen.keys if key.startswith("digits/")}
        for name, chosen in found.sets.items()
    }
    for name in ("train", "validation", "test"):
        assert (styles[name], parts[name]) == ({"plain"}, {name})
        assert set(found.sets[name].labels) == set(range(6))
    assert Counter(found.sets["train"].labels) == dict.fromkeys(range(6), 16)
    shifted = {n: s for n, s in styles.items() if SetName.parse(n).role == "shifted"}
    assert sorted(map(sorted, shifted.values())) == [
        ["blurred"],
        ["inverted"],
        ["noisy"],
        ["rotated"],
    ]
    for name in shifted:
        assert parts[name] == {"test"}
        assert set(found.sets[name].labels) == set(range(6))
    assert parts["outliers"] == {"train"}
    assert parts["validation_ood/six"] == {"validation", "test"}
    photos = {name: {key.split("/")[0] for key in chosen.keys} for name, chosen in
              found.sets.items()}  # fmt: skip
    assert photos["validation_ood/china"] == {"china"}
    assert photos["ood/far/flower patches"] == {"flower"}
    near = [name for name in found.sets if name.startswith("ood/near/")]
    assert len(near) == 2
    assert all(parts[name] == {"test"} and styles[name] == {"plain"} for name in near)
