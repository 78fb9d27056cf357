"""The embedded benchmark's images: scikit-learn's digits in five styles, and photo patches.

Real images without a download. Keys are `digits/INDEX/STYLE` (the index in
`sklearn.datasets.load_digits`), `flower/N` and `china/N` (the N-th 32 x 32 patch of
`sklearn.datasets.load_sample_images`, in grey like the digits). Every image is an 8-bit PNG of
32 x 32 pixels; noise and angle depend on the key alone.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pipelines.config import CONF, Section
from pipelines.data.schema import INDEX

SIZE = 32
STYLES = ("plain", "inverted", "noisy", "rotated", "blurred")
PHOTOS = ("china", "flower")
NOISE_STD = 60.0  # of 255
BLUR_RADIUS = 2.2  # pixels of 32
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DigitsSource(Section):
    """scikit-learn's handwritten digits and photo patches."""

    kind: Literal["digits"] = "digits"

    def index(self) -> pa.Table:
        """Every digit in every style (class_name: the digit in words) and every patch."""
        splits = split()
        rows = [
            {"key": f"digits/{i:04d}/{style}", "class_name": NAMES[label], "domain": style,
             "split": splits[i]}
            for i, label in enumerate(labels())
            for style in STYLES
        ]  # fmt: skip
        rows += [
            {"key": f"{photo}/{n:03d}", "class_name": photo, "domain": "photo"}
            for photo in PHOTOS
            for n in range(patches())
        ]
        return pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema=INDEX)

    def fingerprint(self) -> str:
        """A digest over the pixels that scikit-learn ships and what is done to them."""
        sums = [hashlib.sha256(np.ascontiguousarray(_digits()[0]).tobytes()).hexdigest()]
        sums += [hashlib.sha256(_grey(photo).tobytes()).hexdigest() for photo in PHOTOS]
        # One image of each style stands for the code that draws them.
        drawn = self.read([f"digits/0003/{style}" for style in STYLES])
        sums += [hashlib.sha256(_pixels(image).tobytes()).hexdigest() for image in drawn]
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """PNG bytes of each key, or a KeyError for a key there is not."""
        return [_encode(key) for key in keys]


@cache
def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    with gzip.open(_sklearn_file("data", "digits.csv.gz"), "rt", encoding="utf-8") as file:
        rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


def _sklearn_file(*parts: str) -> Path:
    """A file of `sklearn.datasets`, found without the import, which takes a second."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("scikit-learn is not installed")
    return Path(spec.origin).parent.joinpath("datasets", *parts)


def split() -> dict[int, str]:
    """train, validation or test for every index, from the stored list."""
    stored = json.loads((CONF / "benchmark" / "digits_split.json").read_text())
    return {i: part for part in ("train", "validation", "test") for i in stored[part]}


def labels() -> NDArray[np.int64]:
    """The digit (0-9) of every image, by scikit-learn's index."""
    return _digits()[1]


@cache
def _grey(photo: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(_sklearn_file("images", f"{photo}.jpg")).convert("L"))


def patches() -> int:
    """The number of patches that do not overlap in each photo."""
    height, width = _grey(PHOTOS[0]).shape
    return int(height // SIZE) * int(width // SIZE)


def _encode(key: str) -> bytes | Exception:
    name, _, rest = key.partition("/")
    number, _, style = rest.partition("/")
    try:
        if name in PHOTOS and key == f"{name}/{int(number):03d}":
            image = _patch(name, int(number))
        elif key == f"digits/{int(number):04d}/{style}" and int(number) >= 0:
            image = _digit(int(number), style)
        else:
            raise KeyError(key)
    except (KeyError, ValueError, IndexError):
        return KeyError(f"{key}: no such image in the digits source")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _patch(photo: str, number: int) -> Image.Image:
    if not 0 <= number < patches():
        raise IndexError(number)
    grey = _grey(photo)
    row, column = divmod(number, grey.shape[1] // SIZE)
    return Image.fromarray(grey[row * SIZE :, column * SIZE :][:SIZE, :SIZE])


def _digit(number: int, style: str) -> Image.Image:
    small = np.round(_digits()[0][number] * (255 / 16)).astype(np.uint8)
    plain = Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if style == "plain":
        return plain
    if style == "inverted":
        return Image.fromarray(255 - np.asarray(plain))
    if style == "noisy":
        noise = np.random.Generator(np.random.PCG64(number)).normal(0, NOISE_STD, (SIZE, SIZE))
        return Image.fromarray(np.clip(np.asarray(plain) + noise, 0, 255).astype(np.uint8))
    if style == "rotated":
        angle = 30 + number % 16  # degrees, either way round
        return plain.rotate(angle if number % 2 else -angle, Image.Resampling.BICUBIC)
    if style == "blurred":
        return plain.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))
    raise KeyError(style)


def _pixels(image: bytes | Exception) -> NDArray[np.uint8]:
    if isinstance(image, Exception):
        raise image
    return np.asarray(Image.open(io.BytesIO(image)))
