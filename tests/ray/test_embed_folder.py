"""A folder of one's own images, as a new user tries it: commands, their words and what they say."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer
from pipelines.data.features import FeatureCache
from pipelines.data.storage import Storage
from tests.ray.commands import job, job_here

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def backbone(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    architecture, weights = backbone_files["vit"]
    return BackboneConfig(name="tiny", config=str(architecture), path=str(weights))


@pytest.fixture
def words(backbone: BackboneConfig, tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(backbone.model_dump()))
    return (f"backbone=@{tmp_path / 'tiny.yaml'}", f"storage={tmp_path / 'storage'}")


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """30 good images in class folders, two bad ones, and a file that is none."""
    copy = tmp_path / "images"
    shutil.copytree(pictures, copy)
    (copy / "cut.jpg").write_bytes((copy / "class_0" / "000.jpg").read_bytes()[:300])
    (copy / "class_1" / "nothing.png").touch()
    (copy / "notes.txt").write_text("not an image, and not listed")
    return copy


def address_in(done: Done) -> str:
    return done.stdout.rstrip().rpartition("/")[2]


@pytest.mark.slow
def test_too_many_bad_images_stop_it(folder: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    strict = job("embed", f"source={folder}", *words, "embed.shard_rows=8", "max_rejected=0.03")
    assert strict.returncode == 2, strict.stderr
    (line,) = strict.stderr.splitlines()
    assert line.startswith("error: source images: ")
    assert "of 32 images cannot be used, max_rejected=0.03" in line
    assert "class_1/nothing.png: no bytes" in line
    assert not list((tmp_path / "storage").rglob("manifest.json"))


@pytest.mark.slow
def test_bad_images_are_counted_and_a_second_run_has_nothing_to_do(
    folder: Path, words: tuple[str, ...], backbone: BackboneConfig, tmp_path: Path
) -> None:
    done = job("embed", f"source={folder}", *words, "embed.shard_rows=8", "max_rejected=0.1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "embed     ..."
    assert lines[-2].startswith("embed     done in ")
    assert "embed: 30 features, 2 rejected (1 truncated, 1 empty): " in lines[-1] or (
        "embed: 30 features, 2 rejected (1 empty, 1 truncated): " in lines[-1]
    )

    cache = FeatureCache(Storage.open(str(tmp_path / "storage")), address_in(done))
    listed = pq.read_table(lines[-1].rpartition(": ")[2] + "/rejected.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in listed] == [
        ("class_1/nothing.png", "empty"),
        ("cut.jpg", "truncated"),
    ]
    keys = sorted(str(p.relative_to(folder)) for p in folder.glob("*/*.jpg"))
    assert cache.keys().to_pylist() == keys
    loaded = network.load(backbone)
    contents: list[bytes | Exception] = [(folder / key).read_bytes() for key in keys]
    alone = Encoder(loaded, 30).encode(Preparer(loaded.crop).batches(keys, contents, 30))
    np.testing.assert_allclose(cache.load(keys), alone.columns["feature"], rtol=0, atol=1e-5)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "storage").rglob("*.*")}
    again = job("embed", f"source={folder}", *words, "embed.shard_rows=8")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == lines[-1]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "storage").rglob("*.*")}


@pytest.mark.slow
def test_mistakes_are_one_line_each(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\ncat\n")
    for more, message in (
        ((f"source={tmp_path}/none",), "none: no such folder, Parquet file or tar archive"),
        ((f"source={tmp_path}/empty",), "empty: no image here (looked for .jpg"),
        ((f"source={tmp_path}", f"class_names={names}"), "'cat' stands there twice"),
        ((f"source={tmp_path}", "odin.eps=0.1"), "give class_names=FILE too"),
    ):
        done = job_here("embed", *more, *words)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "storage").exists()
