"""A trained head with its score and threshold: features or images in, verdicts out.

The library's front door, without Ray and without MLflow:

    detector = Detector.load(Path("detector"))
    verdicts = detector.judge_images([Path("image.jpg").read_bytes()])
    print(verdicts.to_pylist())  # class_name, score, threshold, is_ood, confidence, p_value, error
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import FEATURE, LOCAL, Encoder, Preparer, of_both
from pipelines.backbones.network import load
from pipelines.backbones.tower import Tower
from pipelines.config import UserError
from pipelines.data.images import DEFAULT, Decoding
from pipelines.data.kept import Damaged, Entry, FileSeal
from pipelines.data.storage import Storage
from pipelines.heads import Predictor
from pipelines.ood.conformal import p_values
from pipelines.records import StoredRecord, Value
from pipelines.register.examples import Examples
from pipelines.score.by_name import (
    OWN_PASS,
    Records,
    from_bytes,
    pixel_pass,
    reads_local,
    to_bytes,
)
from pipelines.score.judge import judge

# The folder of a detector among a registered model's artifacts.
ARTIFACT = "detector"
# What describes a detector in its folder and seals the files of its parts.
FILE = "detector.json"
PREDICTOR = ("head.json", "head.safetensors")
KNOWN_SCORES = "known-scores.safetensors"
EXAMPLES = "training-examples.parquet"

VERDICTS = pa.schema(
    [
        pa.field("class_name", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("threshold", pa.float64(), nullable=False),
        pa.field("is_ood", pa.bool_()),
        pa.field("confidence", pa.float64()),
        pa.field("p_value", pa.float64()),
        pa.field("error", pa.string()),
    ]
)


class DetectorRecord(StoredRecord):
    """The content of `detector.json`; attributes are those of `Detector`.

    Attributes:
        backbone: its files by their names in the folder.
        records: names of what was fitted for the score.
        num_known: how many scores of ID validation images the folder holds.
        num_examples: how many training images it holds; models of earlier versions hold none.
    """

    score: str
    params: dict[str, int | float]
    threshold: float
    temperature: float = 1.0
    decoding: Decoding = DEFAULT
    batch_size: int = 64
    backbone: BackboneConfig | None = None
    facts: dict[str, Value] = Field(default_factory=dict)
    records: tuple[str, ...] = ()
    num_known: int = 0
    num_examples: int = 0
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detector:
    """What a model registry holds: everything that a verdict needs, in one folder.

    Attributes:
        predictor: the trained head.
        backbone: resolved; None judges features only.
        score: its name (`pipelines.score.by_name`).
        params: its parameters.
        threshold: an image with a lower score is out of distribution.
        temperature: of the confidence, set on ID validation; no score or class depends on it.
        records: what was fitted for the score, by name.
        decoding: how bytes became pixels when the head was trained.
        batch_size: most images encoded at once.
        facts: what else is worth knowing (method, target_tpr, benchmark ...), never used.
        known_scores: (N,) of the ID validation images, which p-values compare with; of none, no
            image has a p-value.
        examples: training images, for explanations alone; None where the model carries none.
        words: the negative words of the record of neg_label, in its order.
    """

    predictor: Predictor
    backbone: BackboneConfig | None
    score: str
    params: Mapping[str, float]
    threshold: float
    temperature: float = 1.0
    decoding: Decoding = DEFAULT
    batch_size: int = 64
    facts: Mapping[str, Value] = field(default_factory=dict)
    records: Records = field(default_factory=dict)
    known_scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    examples: Examples | None = None
    words: tuple[str, ...] = ()

    @cached_property
    def network(self) -> Tower:
        """The backbone, loaded when first used."""
        if self.backbone is None:
            raise UserError("this detector was saved without a backbone: it judges features only")
        return load(self.backbone)

    @property
    def needs_local(self) -> bool:
        """Whether a verdict needs local features beside an image's own."""
        return self.predictor.takes_local or reads_local([self.score])

    @property
    def needs_images(self) -> bool:
        """Whether an image's own features are not enough for a verdict."""
        return self.needs_local or self.score in OWN_PASS

    def judge_features(
        self,
        features: NDArray[np.float32],
        local: NDArray[np.float32] | None = None,
        own_pass: NDArray[np.float32] | None = None,
    ) -> pa.Table:
        """Verdicts (`VERDICTS`) on image features (N, D), of unit length where the head takes such.

        Args:
            features: of N images.
            local: (N, P, D) unit local features, where a verdict `needs_local`.
            own_pass: (N, W) what the score's own pass over the pixels gave, if it has one.

        Raises:
            UserError: where they are needed and missing.
        """
        features = np.ascontiguousarray(features, dtype=np.float32)
        passes = {} if own_pass is None else {self.score: own_pass}
        scores_of = {self.score: self.params}
        judged = judge(
            self.predictor,
            scores_of,
            features,
            self.records,
            local,
            passes,
            temperature=self.temperature,
        )
        scores = judged[f"score_{self.score}"]
        columns = [
            pa.array(self.predictor.class_names, pa.string()).take(pa.array(judged["predicted"])),
            pa.array(scores),
            pa.array(np.full(len(scores), self.threshold)),
            pa.array(scores < self.threshold),
            pa.array(judged["confidence"]),
            self._p_values(scores),
            pa.nulls(len(scores), pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=VERDICTS)

    def _p_values(self, scores: NDArray[np.float64]) -> pa.Array:
        """Marginal conformal p-values; null where there is nothing to compare with."""
        if not len(self.known_scores) or not len(scores):
            return pa.nulls(len(scores), pa.float64())
        return pa.array(p_values(self.known_scores, scores))

    def judge_images(self, contents: Sequence[bytes | Exception]) -> pa.Table:
        """Verdicts (`VERDICTS`) on encoded images, in order; a bad one has an `error` alone."""
        size = min(self.batch_size, max(1, len(contents)))
        keys = [str(number) for number in range(len(contents))]
        preparer = Preparer(self.network.crop, self.decoding)
        batches = list(preparer.batches(keys, contents, size))
        encoded, own_pass = Encoder(self.network, size, self.needs_local).encode(batches), None
        if self.score in OWN_PASS:
            assert self.backbone is not None  # it has just encoded
            how = pixel_pass(self.score, self.params, self.records, self.backbone)
            encoded, other = of_both(
                encoded, Encoder(self.network, size, pixel_pass=how).encode(batches)
            )
            own_pass = other.columns[FEATURE]
        columns = encoded.columns
        judged = self.judge_features(columns[FEATURE], columns.get(LOCAL), own_pass)
        verdicts = iter(judged.to_pylist())
        nothing = {**dict.fromkeys(VERDICTS.names), "threshold": self.threshold}
        rows = [
            next(verdicts) if bad is None else {**nothing, "error": f"{bad.reason}: {bad.message}"}
            for bad in encoded.verdicts
        ]
        return pa.Table.from_pylist(rows, schema=VERDICTS)

    def save(self, folder: Path) -> None:
        """Write the head, what the score reads, examples and backbone, and what seals them.

        That is `detector.json`, with size and SHA-256 of every other file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        contents = dict(self.predictor.files())
        contents |= {_record_file(name): to_bytes(record) for name, record in self.records.items()}
        if len(self.known_scores):
            contents[KNOWN_SCORES] = safetensors.numpy.save({"scores": self.known_scores})
        if self.examples is not None:
            contents[EXAMPLES] = self.examples.to_bytes()
        backbone = None if self.backbone is None else _copy_backbone(self.backbone, folder)
        record = DetectorRecord(
            score=self.score,
            params=dict(self.params),
            threshold=self.threshold,
            temperature=self.temperature,
            decoding=self.decoding,
            batch_size=self.batch_size,
            backbone=backbone,
            facts=dict(self.facts),
            records=tuple(sorted(self.records)),
            num_known=len(self.known_scores),
            num_examples=0 if self.examples is None else len(self.examples.keys),
            words=self.words,
        )
        named = () if backbone is None else (backbone.path, backbone.config)
        copied = {name: FileSeal.of_file(folder / name) for name in named if name is not None}
        _entry(folder).write(record, contents, there=copied)

    @classmethod
    def load(cls, folder: Path) -> Detector:
        """Read what `save` wrote, wherever the folder lies now.

        Raises:
            UserError: where the folder holds no detector, or one that is not as it was saved:
                that one judges nothing.
        """
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: no detector there (no file {FILE})")
        entry = _entry(folder)
        try:
            record = entry.check()
            records = [_record_file(name) for name in record.records]
            known = [KNOWN_SCORES] if record.num_known else []
            examples = [EXAMPLES] if record.num_examples else []
            _, files = entry.read_all([*PREDICTOR, *records, *known, *examples])
        except Damaged as damaged:
            raise UserError(
                f"{damaged.place}: {damaged.why}; this model judges nothing. Restore it: run "
                "python -m jobs.register with the run's words"
            ) from None
        backbone = record.backbone
        return cls(
            predictor=Predictor.from_files(files),
            backbone=None if backbone is None else _find_backbone(backbone, folder),
            score=record.score,
            params=record.params,
            threshold=record.threshold,
            temperature=record.temperature,
            decoding=record.decoding,
            batch_size=record.batch_size,
            facts=record.facts,
            records={name: from_bytes(name, files[_record_file(name)]) for name in record.records},
            known_scores=safetensors.numpy.load(files[KNOWN_SCORES])["scores"]
            if known
            else np.zeros(0),
            examples=Examples.from_bytes(files[EXAMPLES]) if examples else None,
            words=record.words,
        )


def detector_digest(folder: Path) -> str:
    """A digest of everything in a saved detector: of `detector.json`, which seals the rest.

    It belongs where the folder's own files cannot change it, such as a tag of the model's version.

    Raises:
        UserError: where the folder holds no detector.
    """
    try:
        return hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    except OSError:
        raise UserError(f"{folder}: no detector there (no file {FILE})") from None


def _entry(folder: Path) -> Entry[DetectorRecord]:
    return Entry(Storage(str(folder)), (), DetectorRecord, FILE)


def _record_file(name: str) -> str:
    return f"score-{name}.safetensors"


def _copy_backbone(backbone: BackboneConfig, folder: Path) -> BackboneConfig:
    """Copy the files of a resolved backbone; its configuration with their names there."""
    if backbone.path is None:
        raise UserError(f"backbone {backbone.name}: not resolved yet")
    names: dict[str, str | None] = {
        "path": f"backbone{Path(backbone.path).suffix}",
        "builtin": None,
    }
    if backbone.config is not None:
        names["config"] = "backbone.json"
        shutil.copyfile(backbone.config, folder / "backbone.json")
    shutil.copyfile(backbone.path, folder / str(names["path"]))
    return backbone.model_copy(update=names)


def _find_backbone(saved: BackboneConfig, folder: Path) -> BackboneConfig:
    """The configuration that `_copy_backbone` returned, with full paths."""
    named = {"path": saved.path, "config": saved.config}
    return saved.model_copy(update={k: str(folder / name) for k, name in named.items() if name})
