"""The embedded images: drawn as documented, split as stated, the same for ever."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.ndimage import rotate as scipy_rotate
from sklearn.datasets import load_digits, load_sample_image

from pipelines.config import CONF
from pipelines.data import digits
from pipelines.data.digits import NAMES, STYLES, DigitsSource
from pipelines.data.schema import INDEX
from tests.patience import PATIENCE

SPLIT = json.loads((CONF / "benchmark" / "digits_split.json").read_text())
SOME = (0, 3, 500, 1241, 1796)


def pixels(key: str) -> np.ndarray:
    (content,) = DigitsSource().read([key])
    assert isinstance(content, bytes), content
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
    return np.asarray(image).astype(np.float64)


def styled(index: int, style: str) -> np.ndarray:
    return pixels(f"digits/{index:04d}/{style}")


def similar(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation over the disk that a rotation keeps."""
    y, x = np.mgrid[:32, :32] - 15.5
    disk = x**2 + y**2 < 14**2
    return float(np.corrcoef(a[disk], b[disk])[0, 1])


@pytest.mark.parametrize("index", SOME)
def test_plain_is_the_digit_at_four_times_its_size(index: int) -> None:
    small = load_digits().images[index] * 255 / 16
    # Bicubic upsampling keeps each pixel's mean over its 4 x 4 block nearly as it was.
    blocks = styled(index, "plain").reshape(8, 4, 8, 4).mean(axis=(1, 3))
    assert np.corrcoef(blocks.ravel(), small.ravel())[0, 1] > 0.98
    assert blocks.mean() == pytest.approx(small.mean(), abs=6)


@pytest.mark.parametrize("index", SOME)
def test_inverted_is_the_negative(index: int) -> None:
    np.testing.assert_array_equal(styled(index, "inverted"), 255 - styled(index, "plain"))


def test_noise_has_its_documented_size_and_depends_on_the_key_alone() -> None:
    differences = []
    for index in SOME:
        plain, noisy = styled(index, "plain"), styled(index, "noisy")
        inside = (plain > 80) & (plain < 175)  # clipping touches few of these
        differences.append((noisy - plain)[inside])
        np.testing.assert_array_equal(noisy, styled(index, "noisy"))
    drawn = np.concatenate(differences)
    assert len(drawn) > 400
    assert drawn.std() == pytest.approx(60, abs=8)
    assert drawn.mean() == pytest.approx(0, abs=8)
    assert abs(np.corrcoef(differences[0][:50], differences[1][:50])[0, 1]) < 0.5


@pytest.mark.parametrize("index", SOME)
def test_rotated_turns_by_its_documented_angle(index: int) -> None:
    angle = (30 + index % 16) * (1 if index % 2 else -1)  # degrees, counter-clockwise
    plain, rotated = styled(index, "plain"), styled(index, "rotated")
    fits = {
        turn: similar(rotated, scipy_rotate(plain, turn, reshape=False, order=3))
        for turn in (angle - 10, angle, angle + 10, -angle)
    }
    assert fits[angle] > 0.98
    assert max(fits, key=fits.__getitem__) == angle


@pytest.mark.parametrize("index", SOME)
def test_blurred_is_a_gaussian_of_its_documented_radius(index: int) -> None:
    plain, blurred = styled(index, "plain"), styled(index, "blurred")
    errors = {
        radius: np.abs(blurred - gaussian_filter(plain, radius, mode="nearest")).mean()
        for radius in (1.6, 2.2, 2.8)
    }
    assert errors[2.2] < 3
    assert min(errors, key=errors.__getitem__) == 2.2


@pytest.mark.parametrize("photo", ["china", "flower"])
def test_patches_tile_the_photo_in_grey(photo: str) -> None:
    red, green, blue = np.moveaxis(load_sample_image(f"{photo}.jpg").astype(np.float64), 2, 0)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R 601
    rows, columns = grey.shape[0] // 32, grey.shape[1] // 32
    assert digits.patches() == rows * columns == 260
    for number in (0, 19, 20, 137, 259):
        row, column = divmod(number, columns)
        expected = grey[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        np.testing.assert_allclose(pixels(f"{photo}/{number:03d}"), expected, atol=1.01)


def test_the_split_covers_every_index_once() -> None:
    listed = SPLIT["train"] + SPLIT["validation"] + SPLIT["test"]
    assert sorted(listed) == list(range(1797))
    assert digits.split() == {i: part for part in ("train", "validation", "test")
                              for i in SPLIT[part]}  # fmt: skip


def test_the_split_follows_its_stated_rule() -> None:
    target = load_digits().target
    for digit in range(10):
        ordered = sorted(
            np.flatnonzero(target == digit).tolist(),
            key=lambda i: hashlib.sha256(f"digits-v1/{i}".encode()).hexdigest(),
        )
        first, second = round(0.4 * len(ordered)), round(0.6 * len(ordered))
        parts = {"train": ordered[:first], "validation": ordered[first:second]}
        parts["test"] = ordered[second:]
        for part, expected in parts.items():
            assert sorted(expected) == [i for i in SPLIT[part] if target[i] == digit]


def test_the_index_names_every_image() -> None:
    index = DigitsSource().index()
    assert index.schema == INDEX
    rows = {row["key"]: row for row in index.to_pylist()}
    assert len(rows) == index.num_rows == 1797 * 5 + 2 * 260
    assert list(rows) == sorted(rows)
    target = load_digits().target
    row = rows["digits/1241/noisy"]
    assert row["class_name"] == NAMES[target[1241]]
    assert row["domain"] == "noisy"
    assert 1241 in SPLIT[row["split"]]
    assert rows["china/007"]["class_name"] == "china"
    assert rows["china/007"]["split"] is None
    counts = Counter(row["domain"] for row in rows.values())
    assert counts == {**dict.fromkeys(STYLES, 1797), "photo": 520}


@pytest.mark.parametrize(
    "key",
    [
        "digits/1797/plain",
        "digits/0003/sepia",
        "digits/three/plain",
        "digits/0003",
        "digits/0003/plain/x",
        "digits/-001/plain",
        "china/260",
        "china/-01",
        "mountain/000",
        "elsewhere/0003/plain",
        "",
    ],
)
def test_an_unknown_key_is_named(key: str) -> None:
    good, bad = DigitsSource().read(["digits/0000/plain", key])
    assert isinstance(good, bytes)
    assert isinstance(bad, KeyError)
    assert f"{key}: no such image" in str(bad)


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    command = "from pipelines.data.digits import DigitsSource; print(DigitsSource().fingerprint())"
    elsewhere = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert elsewhere.stdout.strip() == DigitsSource().fingerprint()


def test_the_fingerprint_follows_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = DigitsSource().fingerprint()
    monkeypatch.setattr(digits, "NOISE_STD", 61.0)
    assert DigitsSource().fingerprint() != before
