"""`predict` reads as `embed` does: same limits, same refusals, and nothing raw on a terminal."""

from __future__ import annotations

import io
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import main
from jobs import predict as job
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError
from pipelines.data.limits import LIMITS
from pipelines.data.storage import Storage
from pipelines.heads import Predictor
from pipelines.predict.stage import PredictConfig, Prediction, load_detector, run
from pipelines.register.detector import Detector


@pytest.fixture(scope="module")
def model(
    backbone_files: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A detector in a folder."""
    architecture, weights = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(architecture), path=str(weights))
    text = np.eye(2, 16, dtype=np.float32)
    head = Predictor("zero_shot", {"text_features": text}, {}, 11.5, ("cat", "dog"))
    folder = tmp_path_factory.mktemp("model")
    Detector(head, backbone, "energy", {"tau": 1.0}, 1.2).save(folder)
    return folder


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def judged(source: Path, model: Path) -> dict[str, Prediction]:
    config = PredictConfig(source=str(source), model=str(model))
    return {found.path: found for found in run(config)}


def huge(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(2 * 10**9)
    return path


def test_a_huge_file_alone_or_in_a_folder_is_not_read(model: Path, tmp_path: Path) -> None:
    path = huge(tmp_path / "huge.jpg")
    (tmp_path / "fine.png").write_bytes(png())
    (alone,) = judged(path, model).values()
    assert alone.error is not None
    assert alone.error.startswith("too_large: OSError: [Errno 27] 2,000,000,000 bytes, over")
    found = judged(tmp_path, model)
    assert found[str(path)].error == alone.error
    assert found[str(tmp_path / "fine.png")].error is None


@pytest.mark.slow
def test_members_cells_and_bombs_have_the_limits_of_embed(model: Path, tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    rows = {"fine": png(), "cell": bytes(LIMITS.image_bytes + 1), "bomb": bomb.getvalue()}
    table = pa.table({"key": list(rows), "image": list(rows.values())})
    pq.write_table(table, tmp_path / "x.parquet")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in rows.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    for source in (tmp_path / "x.parquet", tmp_path / "x.tar"):
        reasons = [str(found.error).partition(":")[0] for found in judged(source, model).values()]
        assert sorted(reasons) == ["None", "too_large", "too_large"], source


def test_doubled_keys_are_refused(model: Path, tmp_path: Path) -> None:
    table = pa.table({"key": ["a", "a"], "image": [png(0), png(1)]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"1 keys stand there more than once \(first: a\)"):
        judged(tmp_path / "x.parquet", model)


def test_what_is_printed_cannot_move_the_cursor(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a\nx.png: cat, score 9, threshold 1, ID.png", "b\x1b[2J\x1b]0;title\x07.png"]
    for name in names:
        (tmp_path / name).write_bytes(png())
    (tmp_path / "\x1b[31mbad.png").write_bytes(b"\x1b[31m no image")
    monkeypatch.setattr(sys, "argv", ["jobs.predict", f"source={tmp_path}", f"model={model}"])
    main("predict", job.section, job.predict, job.__doc__)
    said = capsys.readouterr().out
    assert said.count("\n") == 3
    assert said.replace("\n", "").isprintable()
    assert "/b\\x1b[2J\\x1b]0;title\\x07.png: " in said


def test_the_last_line_counts_the_unknown_of_the_batch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(8):
        (images / f"{seed}.png").write_bytes(png(seed))
    (images / "bad.png").write_bytes(b"no image")
    detector = load_detector(str(model), Storage.open(str(tmp_path)))
    scores = [found.score for found in judged(images, model).values() if found.score is not None]
    # 99 known images score higher than all but the highest two: six p-values are 1 / 100.
    cut = sorted(scores)[-2] - 1e-9
    replace(detector, known_scores=cut + 1e-12 * np.arange(99)).save(tmp_path / "with")
    words = [f"source={images}", f"model={tmp_path / 'with'}", "false_alarms=0.05"]
    monkeypatch.setattr(sys, "argv", ["jobs.predict", *words])
    main("predict", job.section, job.predict, job.__doc__)
    said = capsys.readouterr().out.splitlines()
    assert sum("p-value 0.01," in line for line in said) == 6
    assert sum("p-value 1," in line for line in said) == 2
    assert said[-1] == (
        "6 of 9 images are unknown by their p-values; on average at most 0.05 of these are ID"
    )
