"""The parts of suite=embed that need no engine; the whole of it is a command of minutes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import UserError
from pipelines.speed import embed
from pipelines.speed.measure import PeakMemory


def test_the_rate_is_of_what_comes_after_the_first_tenth() -> None:
    # A slow start (20 images in 100 s), then 180 images in 60 s.
    seen = [(100.0, 20), (120.0, 80), (160.0, 200)]
    assert embed.steady_rate(seen) == pytest.approx(180 / 60)


@pytest.mark.parametrize(("scale", "number"), [(1.0, 320), (0.5, 160), (1e-6, 64)])
def test_two_workers_get_the_same_number_of_batches(scale: float, number: int) -> None:
    assert embed._number(320, 16, scale) == number
    assert embed._number(6400, 64, scale) % (2 * 64) == 0


def test_a_wrong_part_or_scale_is_refused() -> None:
    with pytest.raises(UserError, match="only=gpu: no such part; allowed: decoding, vit"):
        embed.run(only="gpu")
    with pytest.raises(ValueError, match="scale"):
        embed.run(scale=0)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
def test_decoders_are_compared_on_the_same_pixels(tmp_path: Path) -> None:
    files = embed._generated(tmp_path, 600, 900, 3)
    rows = {row.name: row for row in embed._decoders(files)}
    assert set(rows) == {
        f"{what}, {who}"
        for what in ("decode", "decode and crop")
        for who in ("Pillow's draft mode", "torchvision's decoder")
    }
    assert all(row.ratio is not None and row.ratio > 0 for row in rows.values())
    # The verdict on draft mode, by hand: half the size of 900 x 600 is enough for the crop.
    content = Path(files[0]).read_bytes()
    small = Image.open(io.BytesIO(content))
    small.draft("RGB", (448, 448))
    assert small.size == (900, 600) or small.size == (450, 300)
    worst = 0
    for path in files:
        one, two = (np.asarray(x, int) for x in _both(Path(path).read_bytes()))
        worst = max(worst, int(np.abs(one - two).max()))
    said = rows["decode, Pillow's draft mode"].note
    expected = f"pixels differ by up to {worst} of 255" if worst else "the same pixels"
    assert said.endswith(expected)


def _both(content: bytes) -> list[np.ndarray]:
    found = []
    for draft in (False, True):
        image = Image.open(io.BytesIO(content))
        if draft:
            image.draft("RGB", (448, 448))
        image = image.convert("RGB")
        short = min(image.size)
        size = tuple(round(224 * side / short) for side in image.size)
        large = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
        found.append(np.asarray(large.crop((left, top, left + 224, top + 224))))
    return found


def test_peak_memory_sees_an_allocation() -> None:
    with PeakMemory() as before:
        _wait()
    with PeakMemory() as peak:
        held = np.ones(16 * 2**20)  # 128 MiB
        _wait()
    assert held.sum() == 16 * 2**20
    assert 100 * 2**20 < peak.largest - before.largest < 180 * 2**20


def _wait() -> None:
    import time

    time.sleep(0.7)
