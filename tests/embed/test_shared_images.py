"""An image that trains or chooses and is tested on, by whatever name, stops the run."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import pipeline
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError, load
from pipelines.data.benchmark_config import BenchmarkConfig
from pipelines.embed import leaks
from pipelines.embed import stage as embed
from pipelines.embed.result import EmbedResult
from pipelines.embed.workers import ShardEncoder, ShardPlan, ShardReceipt
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig

# Folders, each a source and a set; class_0 and class_1 are known.
SETS = {
    "train": ("class_0", "class_1"),
    "validation": ("class_0", "class_1"),
    "test": ("class_0", "class_1"),
    "shifted/ink": ("class_0",),
    "outliers": ("bird",),
    "validation_ood/fish": ("fish",),
    "ood/far/rock": ("rock",),
}


def place(root: Path, name: str, class_name: str, number: int) -> Path:
    return root / name.replace("/", "-") / class_name / f"{number:02d}.png"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two different pictures a class and set."""
    root, random = tmp_path / "images", np.random.default_rng(0)
    for name, classes in SETS.items():
        for class_name in classes:
            for number in range(2):
                path = place(root, name, class_name, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return root


def _here(
    rows: Sequence[ShardPlan], plans: Mapping[str, Any], work: Any, _: Any
) -> Iterator[ShardReceipt]:
    """The actors' work in this process."""
    encoder = ShardEncoder(work, {name: plan.source for name, plan in plans.items()})
    for row in rows:
        done = encoder(row.table())
        yield ShardReceipt.model_validate_json(done["receipt"][0].as_py())


@pytest.fixture
def embedded(
    images: Path,
    backbone_files: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., Run]:
    """Run the stage `embed` on the folders, without Ray; `left_out`: not_keys by set."""
    monkeypatch.setattr(embed, "_encode_shards", _here)
    monkeypatch.setattr(pipeline, "connect", lambda _: contextlib.nullcontext())
    architecture, weights = backbone_files["vit"]
    words = [f"storage={tmp_path / 'storage'}", "methods=[zero_shot]", "sweep=none", "shots=null"]
    words.append("max_rejected=0.4")
    config = load(PipelineConfig, "pipeline", words)

    def run(left_out: Mapping[str, str] | None = None) -> Run:
        sources = {
            name.replace("/", "-"): {
                "kind": "folder",
                "root": str(images / name.replace("/", "-")),
            }
            for name in SETS
        }
        sets = {
            name: {"source": name.replace("/", "-"), "not_keys": (left_out or {}).get(name, [])}
            for name in SETS
        }
        known = {"class_names": ["class_0", "class_1"], "sources": sources, "sets": sets}
        update = {
            "benchmark": BenchmarkConfig.model_validate({"name": "toy", **known}),
            "backbone": BackboneConfig(name="tiny", config=str(architecture), path=str(weights)),
        }
        return pipeline.run(config.model_copy(update=update), Quiet(), only="embed")

    return run


def test_different_images_are_accepted(embedded: Callable[..., Run]) -> None:
    assert embedded().has("embed")


@pytest.mark.parametrize(
    ("seen", "tested"),
    [
        ("train", "test"),
        ("validation", "shifted/ink"),
        ("outliers", "ood/far/rock"),
        ("validation_ood/fish", "ood/far/rock"),
        ("validation_ood/fish", "test"),
        # Neither is tested, but one trains and the other chooses.
        ("train", "validation"),
        ("outliers", "validation_ood/fish"),
        # Known and unknown at once.
        ("outliers", "train"),
        ("train", "validation_ood/fish"),
        ("validation_ood/fish", "validation"),
        ("ood/far/rock", "test"),
        ("ood/far/rock", "shifted/ink"),
    ],
)
def test_the_same_file_by_another_name_is_refused_and_named(
    embedded: Callable[..., Run], images: Path, tmp_path: Path, seen: str, tested: str
) -> None:
    first = place(images, seen, SETS[seen][0], 1)
    other = place(images, tested, SETS[tested][0], 77)
    shutil.copy(first, other)
    with pytest.raises(UserError) as caught:
        embedded()
    message = str(caught.value)
    assert message.startswith(
        f"benchmark 'toy': {seen!r} and {tested!r} share 1 image: {SETS[seen][0]}/01.png of "
        f"{seen.replace('/', '-')} is {SETS[tested][0]}/77.png of {tested.replace('/', '-')}."
    )
    assert not list(tmp_path.glob("storage/runs/*/embed.json"))  # so that no later stage starts
    # The word that the message gives helps.
    word = message.rpartition("'benchmark.sets.")[2].rstrip("'")
    name, _, keys = word.partition(".not_keys=")
    assert name == seen
    found = embedded({name: keys})
    assert found.has("embed")
    assert f"{SETS[seen][0]}/01.png" not in found.benchmark.sets[seen].keys


def test_another_lossless_format_is_the_same_image_and_one_pixel_is_not(
    embedded: Callable[..., Run], images: Path
) -> None:
    original = Image.open(place(images, "outliers", "bird", 0))
    changed = np.asarray(original).copy()
    changed[20, 25] ^= 128
    other = place(images, "ood/far/rock", "rock", 5)
    Image.fromarray(changed).save(other)
    embedded()
    other.unlink()
    original.save(other.with_suffix(".webp"), lossless=True)
    with pytest.raises(UserError, match="'outliers' and 'ood/far/rock' share 1 image"):
        embedded()


def test_several_overlaps_are_counted_apart(embedded: Callable[..., Run], images: Path) -> None:
    for number in range(2):
        bird = place(images, "outliers", "bird", number)
        shutil.copy(bird, place(images, "ood/far/rock", "rock", 10 + number))
    shutil.copy(place(images, "train", "class_0", 0), place(images, "shifted/ink", "class_0", 30))
    with pytest.raises(UserError) as caught:
        embedded()
    assert "'outliers' and 'ood/far/rock' share 2 images" in str(caught.value)
    assert "'train' and 'shifted/ink' share 1 image:" in str(caught.value)


def test_a_rejected_image_has_no_hash(embedded: Callable[..., Run], images: Path) -> None:
    for name, class_name in (("train", "class_0"), ("test", "class_0")):
        content = io.BytesIO()
        Image.new("RGB", (9, 9)).save(content, "PNG")
        place(images, name, class_name, 8).write_bytes(content.getvalue()[:40])
    found = embedded()
    assert found.has("embed")
    assert "class_0/08.png" in found.benchmark.sets["test"].keys
    result = found.embedded
    assert (result.benchmark, set(result.sources)) == ("toy", {n.replace("/", "-") for n in SETS})
    source = result.sources["test"]
    assert [(row.key, row.reason) for row in source.rejected] == [
        ("class_0/08.png", "not_an_image")
    ]
    assert source.rows == found.sets.caches["test"].manifest.rows
    assert EmbedResult.from_json(result.to_json(), "embed.json") == result


def test_what_counts_twice_is_said(
    embedded: Callable[..., Run], images: Path, tmp_path: Path
) -> None:
    shutil.copy(place(images, "test", "class_0", 0), place(images, "shifted/ink", "class_0", 50))
    shutil.copy(place(images, "ood/far/rock", "rock", 1), place(images, "ood/far/rock", "rock", 60))
    shutil.copy(place(images, "train", "class_0", 1), place(images, "train", "class_1", 70))
    found = embedded()
    sentences = [entry.first for entry in found.embedded.shared]
    assert sentences == [
        "'train' holds 1 image twice: class_1/70.png of train is class_0/01.png of train",
        "'shifted/ink' and 'test' share 1 image: class_0/50.png of shifted-ink is class_0/00.png "
        "of test",
        "'ood/far/rock' holds 1 image twice: rock/60.png of ood-far-rock is rock/01.png of "
        "ood-far-rock",
    ]
    (kept,) = tmp_path.glob("storage/runs/*/shared_images.json")
    assert json.loads(kept.read_text()) == {
        "train": ["class_1/70.png"],
        "shifted/ink": ["class_0/50.png"],
        "ood/far/rock": ["rock/60.png"],
    }
    assert EmbedResult.from_json(found.embedded.to_json(), "embed.json") == found.embedded


def test_two_sets_of_a_role_share_and_the_later_is_named_to_leave() -> None:
    assert leaks._in_order(["ood/a/x", "test", "ood/b/y"]) == ["ood/b/y", "ood/a/x", "test"]
    assert leaks._why("ood/b/y", "ood/a/x") == leaks._why("shifted/a", "test") == ""


def test_every_pair_of_roles_is_judged() -> None:
    """Of two roles, `test` and `shifted` alone may have an image in common."""
    roles = ("train", "validation", "outliers", "validation_ood", "test", "shifted", "ood")
    for one, two in itertools.combinations(roles, 2):
        names = [f"{r}/g/n" if r == "ood" else r for r in (one, two)]
        kept = {one, two} == {"test", "shifted"}
        assert bool(leaks._why(*names)) is not kept, names
