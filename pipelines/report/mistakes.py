"""The most confident mistakes of a scored method, with small copies of their images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.report.figures import ScoredMethod
from pipelines.report.tables import set_label

# The encoded image of (set name, key), or None where it cannot be had.
Images: TypeAlias = Callable[[str, str], bytes | None]

_SAMPLES = 6
_THUMBNAIL = 112


@dataclass(frozen=True)
class Mistake:
    """An image that a method gets wrong: its thumbnail as a data URI, and what was said of it."""

    set_label: str
    set_name: str
    key: str
    truth: str
    predicted: str
    confidence: float
    score: float
    picture: str


@dataclass(frozen=True)
class MistakeKind:
    """One way of being wrong: how many images it happens to, and the most confident of them."""

    name: str
    num_images: int
    samples: list[Mistake]


def mistakes(
    scored: ScoredMethod, class_names: Sequence[str], image: Images
) -> Iterator[MistakeKind]:
    """Every kind of mistake of a method under its selection criterion and its threshold."""
    table = scored.table
    kinds = scored.row_kinds
    score = np.asarray(table[f"score_{scored.score}"], dtype=np.float64)
    confidence = np.asarray(table["confidence"], dtype=np.float64)
    wrong = np.asarray(table["predicted"]) != np.asarray(table["label"])
    accepted, known = score >= scored.threshold, kinds == "ID"
    found: list[tuple[str, NDArray[np.bool_], NDArray[np.float64]]] = [
        ("ID taken for OOD", known & ~accepted, score),
        ("ID with the wrong class", known & wrong, -confidence),
        *(
            (f"{group} OOD accepted", (kinds == group) & accepted, -score)
            for group in scored.groups
        ),
    ]
    named = table.append_column("score", pa.array(score))
    for name, chosen, worst in found:
        ranked = named.filter(pa.array(chosen)).append_column("worst", pa.array(worst[chosen]))
        ranked = ranked.sort_by(
            [("worst", "ascending"), ("set", "ascending"), ("key", "ascending")]
        )
        samples = _samples(ranked.slice(0, _SAMPLES), class_names, image)
        yield MistakeKind(name, len(ranked), samples)


def _samples(rows: pa.Table, class_names: Sequence[str], image: Images) -> list[Mistake]:
    return [
        Mistake(
            set_label=set_label(row["set"]),
            set_name=row["set"],
            key=row["key"],
            truth=class_names[row["label"]] if row["label"] >= 0 else "",
            predicted=class_names[row["predicted"]],
            confidence=row["confidence"],
            score=row["score"],
            picture=_thumbnail(image(row["set"], row["key"])),
        )
        for row in rows.to_pylist()
    ]


def _thumbnail(encoded: bytes | None) -> str:
    """A small copy of an image as a data URI; empty where there is none or it cannot be read."""
    if encoded is None:
        return ""
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            opened.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small = max(image.size) <= 40  # few pixels: keep them sharp
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return data_uri(image, "PNG" if small else "JPEG")


def data_uri(image: Image.Image, form: Literal["PNG", "JPEG"]) -> str:
    """An image as it stands in a page that loads nothing."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 82} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
