"""The registered model on a file or a folder of images: one decision for each.

From Python, without Ray:

    detector = load_detector("models:/energy-ood@champion", Storage.open("./outputs"))
    verdicts = detector.judge_images([Path("image.jpg").read_bytes()])
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from pydantic import Field

from pipelines.config import Section, UserError

if TYPE_CHECKING:
    from pipelines.data.sources import Source
    from pipelines.data.storage import Storage
    from pipelines.predict.explain import Explanation
    from pipelines.register.detector import Detector
    from pipelines.score.patches import PatchMap

# Paths of images and their encoded contents.
Batch: TypeAlias = tuple[Sequence[str], Sequence[bytes | Exception]]
# Most images that one command explains: a map is a file, and a page of text an image is read by
# a person.
MAX_EXPLAINED = 200


class PredictConfig(Section):
    """Which images, and which model judges them."""

    source: str | None = Field(
        None, description="an image, a folder of images, a Parquet file or a tar archive"
    )
    model: str = Field(
        "models:/energy-ood@champion", description="registered model, or a detector's folder"
    )
    batch_size: int = Field(64, ge=1, description="images encoded at once")
    false_alarms: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="largest share of ID images, on average, among those that are "
        "counted as unknown over all images",
    )
    explain: bool = Field(
        False,
        description=f"say of each image, {MAX_EXPLAINED} at most, its likeliest classes, the "
        "training images that it is like, its strongest negative words, and write a map of its "
        "patches",
    )
    explain_to: str | None = Field(
        None, description="folder of the maps; default: explained/ in the storage folder"
    )
    storage: str = Field("./outputs", description="folder that the pipeline wrote to")
    tracking_uri: str | None = Field(
        None, description="MLflow server; default: SQLite in the storage folder"
    )


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        path: of the image, as the source names it.
        class_name: the likeliest class, or None where the image cannot be used.
        score: higher is more in-distribution.
        threshold: a lower score is out of distribution.
        is_ood: the decision.
        confidence: softmax probability of the class.
        p_value: for an image like those of ID validation, P(p_value <= t) is at most t; None
            where the model holds no scores of theirs.
        error: why the image cannot be used, or None.
        explanation: why the model says so, where that was asked for.
        map_file: the picture of its patches, where there is one.
    """

    path: str
    class_name: str | None
    score: float | None
    threshold: float
    is_ood: bool | None
    confidence: float | None
    p_value: float | None
    error: str | None
    explanation: Explanation | None = None
    map_file: str | None = None


def run(config: PredictConfig) -> Iterator[Prediction]:
    """Judge every image of `config.source`, in the order of their names.

    Raises:
        UserError: at once where there is no image or no model; a bad image is a `Prediction`
            with an error.
    """
    from pipelines.data import files
    from pipelines.data.sources import open_source
    from pipelines.data.storage import Storage

    if config.source is None:
        raise UserError("source: give an image or a folder of images, source=PATH")
    single = _is_one_image(files.here(config.source))
    source = None if single else open_source(config.source)
    keys = [] if source is None else source.index()["key"].to_pylist()
    if config.explain and len(keys) > MAX_EXPLAINED:
        raise UserError(
            f"explain=true: {len(keys)} images, and at most {MAX_EXPLAINED} are explained at once; "
            "give an image or a smaller folder"
        )
    storage = Storage.open(config.storage)
    detector = load_detector(config.model, storage, tracking_uri=config.tracking_uri)
    detector = replace(detector, batch_size=config.batch_size)
    batches: Iterable[Batch]
    if source is None:
        batches = [([config.source], [_read(files.here(config.source))])]
    else:
        batches = _in_batches(detector, config.source, source, keys)
    if not config.explain:
        return _judged(detector, batches)
    folder = config.explain_to or storage.path("explained")
    return _explained(detector, batches, Storage.open(folder))


def num_unknown(predictions: Sequence[Prediction], false_alarms: float) -> int | None:
    """How many images are unknown, of which at most the share `false_alarms` is ID on average.

    By Benjamini and Hochberg's rule on the p-values of all (`pipelines.ood.conformal.unknown`);
    None where none has one.
    """
    from pipelines.ood.conformal import unknown

    p = [found.p_value for found in predictions if found.p_value is not None]
    return int(unknown(np.asarray(p), false_alarms).sum()) if p else None


def load_detector(model: str, storage: Storage, *, tracking_uri: str | None = None) -> Detector:
    """The detector of a registered model, or of a folder that `Detector.save` wrote.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder.
        storage: where the pipeline keeps its MLflow store.
        tracking_uri: another MLflow store.

    Raises:
        UserError: where there is no such model, or its files cannot be read.
    """
    from pipelines.register.detector import ARTIFACT, Detector
    from pipelines.store.errors import said_clearly

    with said_clearly(storage):
        if not model.startswith("models:/"):
            return Detector.load(Path(model).expanduser())
        from pipelines.store.registry import model_folder

        files = model_folder(storage, tracking_uri, model)
        return Detector.load(files / "artifacts" / ARTIFACT)


def _in_batches(
    detector: Detector, name: str, source: Source, keys: Sequence[str]
) -> Iterator[Batch]:
    from pipelines.data import files

    for start in range(0, len(keys), detector.batch_size):
        batch = keys[start : start + detector.batch_size]
        yield [files.join(name, key) for key in batch], source.read(batch)


def _judged(detector: Detector, batches: Iterable[Batch]) -> Iterator[Prediction]:
    for paths, contents in batches:
        verdicts = detector.judge_images(contents).to_pylist()
        for path, verdict in zip(paths, verdicts, strict=True):
            yield Prediction(path=path, **verdict)


def _explained(
    detector: Detector, batches: Iterable[Batch], folder: Storage
) -> Iterator[Prediction]:
    """The same with explanations; a map is written before its image's turn.

    Images are encoded twice: a verdict owes nothing to whether it is explained.
    """
    from pipelines.predict.explain import explain_images

    number = itertools.count(1)
    for paths, contents in batches:
        explanations = explain_images(detector, contents)
        judged = _judged(detector, [(paths, contents)])
        for found, explanation in zip(judged, explanations, strict=True):
            name = f"{next(number):03d}-{_file_name(found.path)}.png"
            patches = None if explanation is None else explanation.patches
            written = None if patches is None else _write_map(patches, folder, name)
            yield replace(found, explanation=explanation, map_file=written)


def _file_name(path: str) -> str:
    """The last part of a path without its ending, of characters that any file system takes."""
    return re.sub(r"[^\w.-]", "_", Path(path).stem, flags=re.ASCII)[:60]


def _write_map(patches: PatchMap, folder: Storage, name: str) -> str:
    from pipelines.plots import heat_map

    file = io.BytesIO()
    heat_map(patches.crop, patches.values).save(file, "PNG")
    try:
        folder.write_bytes(file.getvalue(), name)
    except OSError as error:
        raise UserError(
            f"explain_to={folder.root}: cannot be written ({error.strerror or error})"
        ) from None
    return folder.path(name)


def _is_one_image(path: Path) -> bool:
    try:
        return path.is_file() and path.suffix not in (".parquet", ".tar")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read(path: Path) -> bytes | Exception:
    from pipelines.data import files

    try:
        return files.read(str(path))
    except OSError as error:
        return error
