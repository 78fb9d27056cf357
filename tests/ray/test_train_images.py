"""Decoded images with Ray Data tasks: the bytes that one process writes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from PIL import ImageOps

from pipelines.config import UserError
from pipelines.data.sources import FolderSource
from pipelines.data.storage import Storage
from pipelines.train.images import ImageTable, Making, Preparation, make

PREPARATION = Preparation(
    crop=functools.partial(ImageOps.fit, size=(24, 16)), size=(16, 24), identity={"crop": "fit"}
)


def files(table: ImageTable) -> dict[str, bytes]:
    folder = table.storage.local(*table.entry.folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("ray_cluster")
def test_ray_writes_the_bytes_that_one_process_writes(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for path in pictures.rglob("*.jpg"):
        copy = root / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (root / "class_1" / "004.jpg").write_bytes(b"")
    source = FolderSource(root=str(root))
    tables = []
    for with_ray in (True, False):
        storage = Storage.open(str(tmp_path / f"ray-{with_ray}"))
        making = Making(shard_rows=8, with_ray=with_ray)
        tables.append(
            make(source, storage, name="mine", keys=None, preparation=PREPARATION, making=making)
        )
    on_ray, here = tables
    assert len(on_ray) == 29
    assert files(on_ray) == files(here)
    assert on_ray.rejected()["key"].to_pylist() == ["class_1/004.jpg"]
    assert torch.equal(on_ray.read(range(29)), here.read(range(29)))

    # A shard that is lost is made again by a task; a mistake comes without Ray's traceback.
    before = files(on_ray)
    (on_ray.storage.local(*on_ray.entry.folder) / "00002.arrow").unlink()
    making = Making(shard_rows=8)
    again = make(
        source, on_ray.storage, name="mine", keys=None, preparation=PREPARATION, making=making
    )
    assert files(again) == before
    wrong = Preparation(crop=PREPARATION.crop, size=(16, 16), identity={"crop": "fit"})
    with pytest.raises(UserError, match=r"the crop gave pixels \(16, 24, 3\)"):
        make(source, on_ray.storage, name="mine", keys=None, preparation=wrong, making=making)
