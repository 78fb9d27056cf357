"""Why a model judges an image as it does: classes, words, training images, and where it looks.

    explained = explain_images(detector, [Path("image.jpg").read_bytes()])

Nothing here changes a verdict. What a model cannot give is named in `Explanation.missing`, each
with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.backbones.encoder import FEATURE, LOCAL, Encoder, Preparer
from pipelines.backbones.tower import Tower
from pipelines.config import UserError
from pipelines.data.images import Rejected
from pipelines.heads.comparisons import LEARNED_NEGATIVES, negative_similarity
from pipelines.register.detector import Detector
from pipelines.register.examples import Examples
from pipelines.score.by_name import NEG_LABEL, negative_words
from pipelines.score.patches import PatchMap, patch_maps, why_no_map

# Classes, words and training images that are named, of each.
SHOWN = 5


@dataclass(frozen=True)
class Ranked:
    """A class or a word, and how strongly it speaks for itself: a confidence or a cosine."""

    name: str
    value: float


@dataclass(frozen=True)
class Neighbour:
    """A training image that the judged one is like."""

    key: str
    class_name: str
    cosine: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """What is said of one image beside its verdict.

    Attributes:
        classes: the likeliest with their confidences, which of all classes sum to 1.
        words: the negative words with the largest cosines.
        nearest: the training images with the largest cosines, of those that the model carries.
        patches: the map of the image.
        missing: what of these the model has none of, and why, a line each.
    """

    classes: tuple[Ranked, ...]
    words: tuple[Ranked, ...]
    nearest: tuple[Neighbour, ...]
    patches: PatchMap | None
    missing: tuple[str, ...]


def explain_images(
    detector: Detector, contents: Sequence[bytes | Exception]
) -> list[Explanation | None]:
    """An explanation of each encoded image, in order; None of one that cannot be judged."""
    tower, predictor = detector.network, detector.predictor
    no_map = _why_no_map(detector, tower)
    size = min(detector.batch_size, max(1, len(contents)))
    preparer = Preparer(tower.crop, detector.decoding)
    batches = list(preparer.batches([str(n) for n in range(len(contents))], contents, size))
    encoded = Encoder(tower, size, predictor.takes_local or no_map is None).encode(batches)
    features, local = encoded.columns[FEATURE], encoded.columns.get(LOCAL)
    pixels = [crop for batch in batches for crop in batch]
    good = [place for place, bad in enumerate(encoded.verdicts) if bad is None]
    crops = [crop for crop in (pixels[n] for n in good) if not isinstance(crop, Rejected)]
    maps: Sequence[PatchMap | None] = [None] * len(good)
    if no_map is None and local is not None:
        maps = patch_maps(predictor, detector.score, detector.params, local, crops)
    words, no_words = _words(detector, features)
    nearest, no_nearest = _nearest(detector.examples, predictor.class_names, features)
    missing = tuple(line for line in (no_words, no_nearest, no_map) if line is not None)
    found = zip(_classes(detector, features, local), words, nearest, maps, strict=True)
    explained: list[Explanation | None] = [None] * len(contents)
    for place, parts in zip(good, found, strict=True):
        explained[place] = Explanation(*parts, missing=missing)
    return explained


def _why_no_map(detector: Detector, tower: Tower) -> str | None:
    try:
        why = why_no_map(detector.predictor, lambda: tower.num_local)
    except UserError as error:  # the tower says what it lacks
        why = str(error)
    return why and f"no map: {why}"


def _classes(
    detector: Detector, features: NDArray[np.float32], local: NDArray[np.float32] | None
) -> list[tuple[Ranked, ...]]:
    predictor = detector.predictor
    logits = predictor.class_logits(predictor.similarity(features, local))
    confidence = torch.softmax(logits / detector.temperature, dim=1).numpy()
    return _top(confidence, predictor.class_names)


def _words(
    detector: Detector, features: NDArray[np.float32]
) -> tuple[list[tuple[Ranked, ...]], str | None]:
    """The strongest negative words of each image, or none and why."""
    none: list[tuple[Ranked, ...]] = [()] * len(features)
    if detector.score != NEG_LABEL:
        return none, f"no negative words: the model judges by {detector.score}, not by {NEG_LABEL}"
    if LEARNED_NEGATIVES in detector.predictor.arrays:
        return none, f"no negative words: head {detector.predictor.head} learned its negatives"
    if not detector.words:
        return none, f"no negative words: {_earlier('their names')}"
    words = negative_words(detector.records)
    return _top(negative_similarity(detector.predictor, features, words), detector.words), None


def _nearest(
    examples: Examples | None, class_names: Sequence[str], features: NDArray[np.float32]
) -> tuple[list[tuple[Neighbour, ...]], str | None]:
    """The training images nearest to each image, or none and why."""
    if examples is None:
        why = _earlier("training images, or with register_as.examples=0")
        return [()] * len(features), f"no nearest training images: {why}"
    found = zip(*examples.nearest(features, SHOWN), strict=True)
    return [
        tuple(
            Neighbour(examples.keys[place], class_names[examples.labels[place]], float(cosine))
            for place, cosine in zip(places, cosines, strict=True)
        )
        for places, cosines in found
    ], None


def _earlier(what: str) -> str:
    return (
        f"the model was registered without {what}; python -m jobs.register with the run's words "
        "registers it again"
    )


def _top(values: NDArray[np.floating], names: Sequence[str]) -> list[tuple[Ranked, ...]]:
    """The names with the largest values of each row, the largest first."""
    places = np.argsort(-values, axis=1, kind="stable")[:, :SHOWN]
    return [
        tuple(Ranked(names[place], float(row[place])) for place in order)
        for row, order in zip(values, places, strict=True)
    ]
