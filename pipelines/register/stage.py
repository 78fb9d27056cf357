"""The last stage: a detector becomes a version in MLflow's model registry, once per content."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.code_digest import Code, Entry, code_of
from pipelines.config import digest
from pipelines.data.images import DEFAULT, Decoding
from pipelines.evaluate.metrics import Threshold
from pipelines.heads import Predictor
from pipelines.ood import FITTED_SCORES, SCORES
from pipelines.ood.conformal import ThresholdRule
from pipelines.records import Known, Value
from pipelines.register.calibration import Calibration
from pipelines.register.config import RegisterConfig
from pipelines.register.detector import ARTIFACT, VERDICTS, Detector, detector_digest
from pipelines.register.examples import Examples
from pipelines.register.result import RegisterResult
from pipelines.score import by_name as scoring
from pipelines.score.by_name import Records, to_bytes
from pipelines.store.database import RegisteredVersion, local_path
from pipelines.store.locks import locked
from pipelines.store.processes import temporary_folder
from pipelines.store.registry import DETECTOR, FILES, files_digest, has_files
from pipelines.store.tracker import Tracker, load_mlflow, process_tag

PACKAGE = Path(__file__).resolve().parents[1]
# The module that MLflow runs to get the model.
MODEL = "pipelines.register.mlflow_model"
# What the model imports; MLflow's guess would take seconds and name much more.
REQUIREMENTS = (
    "mlflow", "numpy", "omegaconf", "open_clip_torch", "pandas", "pillow", "pyarrow", "pydantic",
    "fsspec", "safetensors", "scikit-learn", "torch", "torchvision",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """What is to be registered.

    Attributes:
        predictor: the trained head.
        backbone: resolved; its files become part of the model.
        method: that trained the head.
        score: name of the score that judges.
        params: its parameters.
        threshold: set on ID validation; a lower score is out of distribution.
        target_tpr: share of ID validation images that the threshold accepts.
        class_names: of the predictor.
        facts: further tags of the version.
        decoding: how bytes become pixels.
        batch_size: most images encoded at once.
        records: what was fitted for the score, by name.
        calibration: of the confidence.
        known_scores: (N,) of the ID validation images.
        examples: training images that it shows beside what it judged.
        words: the negative words of the record of neg_label, in its order.
    """

    predictor: Predictor
    backbone: BackboneConfig
    method: str
    score: str
    params: Mapping[str, float]
    threshold: Threshold
    target_tpr: float
    class_names: tuple[str, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    decoding: Decoding = DEFAULT
    batch_size: int = 64
    records: Records = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    known_scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    examples: Examples | None = None
    words: tuple[str, ...] = ()

    @property
    def tags(self) -> dict[str, str]:
        """Facts of the version beside those of its method and score."""
        return {
            **self.facts,
            "threshold_low": f"{self.threshold.low:.17g}",
            "threshold_high": f"{self.threshold.high:.17g}",
            "threshold_images": str(self.threshold.num_images),
            "threshold_rule": self.threshold.rule,
            "threshold_known": self.threshold.known,
            **self.calibration.tags,
        }

    def detector(self) -> Detector:
        """The detector that is saved."""
        facts: dict[str, Value] = {
            "method": self.method,
            "target_tpr": self.target_tpr,
            **self.tags,
        }
        return Detector(
            predictor=self.predictor,
            backbone=self.backbone,
            score=self.score,
            params=self.params,
            threshold=self.threshold.value,
            temperature=self.calibration.temperature,
            decoding=self.decoding,
            batch_size=self.batch_size,
            facts=facts,
            records=self.records,
            known_scores=self.known_scores,
            examples=self.examples,
            words=self.words,
        )

    def content(self) -> str:
        """A digest of what decides the model's verdicts and explanations, its code included."""
        files = self.predictor.files()
        examples = b"" if self.examples is None else self.examples.to_bytes()
        return digest(
            {
                "head": {name: hashlib.sha256(files[name]).hexdigest() for name in files},
                "backbone": dict(network.identity(self.backbone)),
                "score": [self.score, dict(self.params), self.threshold.value, self.target_tpr],
                "records": {
                    name: hashlib.sha256(to_bytes(record)).hexdigest()
                    for name, record in self.records.items()
                },
                "decoding": asdict(self.decoding),
                "temperature": self.calibration.temperature,
                "known scores": hashlib.sha256(self.known_scores.tobytes()).hexdigest(),
                "explanation": [hashlib.sha256(examples).hexdigest(), list(self.words)],
                "code": model_code(self.predictor.head, self.score).digest,
            }
        )


def model_code(head: str, score: str) -> Code:
    """The code that can decide a model's verdicts.

    Args:
        head: the name of the head's kind.
        score: the name of the score.
    """
    entries: list[Entry] = [MODEL, f"pipelines.heads.{head}"]
    for name in scoring.with_parts([score]):
        if name in SCORES:
            entries.append(SCORES[name].function)
        elif name in FITTED_SCORES:
            entries.append(FITTED_SCORES[name].record)
        elif name in scoring.TRAINED:
            entries.append(scoring.TRAINED[name])
    return code_of(*entries)


def register(
    candidate: Candidate,
    tracker: Tracker,
    run_id: str,
    *,
    settings: RegisterConfig | None = None,
) -> RegisterResult:
    """Log the model into the run, register it, and let the alias point to it.

    The same content again, also at the same time, finds the version that is there, as long as
    its files are as they were written.
    """
    settings = settings or RegisterConfig()
    content = candidate.content()
    with locked(tracker.storage, "register"):
        version = _find(tracker, settings.name, content)
        if version is None:
            created = _create(candidate, tracker, run_id, settings.name, content)
            version = _first(tracker, settings.name, content, created)
        else:
            _mend_tags(tracker, settings.name, version, _tags(candidate))
        tracker.client.set_registered_model_alias(settings.name, settings.alias, version)
    return RegisterResult(
        name=settings.name,
        model_version=version,
        uri=f"models:/{settings.name}@{settings.alias}",
        method=candidate.method,
        score=candidate.score,
        params=dict(candidate.params),
        threshold=candidate.threshold,
        content=content,
    )


def reason_to_register(
    result: RegisterResult, found: RegisteredVersion | None, uri: str
) -> str | None:
    """Why a run's version has to be registered again; None where the registry still has it.

    Args:
        result: what the run registered.
        found: the version that the alias points to now.
        uri: of the MLflow store.
    """
    if found is None:
        return f"{result.uri} is not in the registry"
    if found.version != result.model_version:
        return f"{result.uri} is version {found.version}, this run's is {result.model_version}"
    if described(result, found) != result or not found.is_ready:
        return f"version {found.version} is not what this run registered"
    if not has_files(found, uri, result.name):
        return f"files of version {found.version} are missing or not as they were written"
    return None


def described(result: RegisterResult, found: RegisteredVersion) -> RegisterResult | None:
    """What the registry says of a version, in the words of `result`; None where it is damaged."""
    tags = found.tags
    names = [key.removeprefix("score.") for key in tags if key.startswith("score.")]
    try:
        return RegisterResult(
            name=result.name,
            model_version=found.version,
            uri=result.uri,
            method=tags["method"],
            score=tags["score"],
            params={name: _number(tags[f"score.{name}"]) for name in names},
            threshold=Threshold(
                value=float(tags["threshold"]),
                low=float(tags["threshold_low"]),
                high=float(tags["threshold_high"]),
                num_images=int(tags["threshold_images"]),
                rule=cast(ThresholdRule, tags["threshold_rule"]),
                known=cast(Known, tags["threshold_known"]),
            ),
            content=tags["content"],
        )
    except (KeyError, ValueError):
        return None


def _number(text: str) -> int | float:
    return int(text) if text.removeprefix("-").isdecimal() else float(text)


def _whole(tracker: Tracker, name: str, content: str) -> list[str]:
    """The versions with that content whose files are as they were written, the first first."""
    client = tracker.client
    query = f"name = '{name}' and tags.content = '{content}'"
    found = []
    for entry in sorted(client.search_model_versions(query), key=lambda v: int(v.version)):
        location = client.get_model_version_download_uri(name, str(entry.version))
        ready = entry.status == "READY"
        version = RegisteredVersion(str(entry.version), ready, location, dict(entry.tags))
        if ready and has_files(version, tracker.uri, name):
            found.append(version.version)
    return found


def _find(tracker: Tracker, name: str, content: str) -> str | None:
    found = _whole(tracker, name, content)
    return found[-1] if found else None


def _first(tracker: Tracker, name: str, content: str, created: str) -> str:
    """Of equal versions that two storages gave one server at once, the first stays."""
    first = (_whole(tracker, name, content) or [created])[0]
    if first != created:
        tracker.client.delete_model_version(name, created)
    return first


def _mend_tags(tracker: Tracker, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set the tags of a version that are not those of its content."""
    there = tracker.client.get_model_version(name, version).tags
    for key, value in tags.items():
        if there.get(key) != value:
            tracker.client.set_model_version_tag(name, version, key, value)


def _create(candidate: Candidate, tracker: Tracker, run_id: str, name: str, content: str) -> str:
    with tracker.current(run_id):
        info, detector = _log(candidate)
        _ensure_name(tracker, name)
        folder = local_path(tracker.client.get_logged_model(info.model_id).artifact_location)
        seals = {DETECTOR: detector, FILES: "" if folder is None else files_digest(folder)}
        # The tags come with the version in one step: no version is ever without its content.
        version = tracker.client.create_model_version(
            name,
            info.model_uri,
            run_id,
            tags={**_tags(candidate), **seals, "content": content},
            model_id=info.model_id,
        )
    return str(version.version)


def _log(candidate: Candidate) -> tuple[Any, str]:
    """Log the model, self-contained, into MLflow's current run.

    Returns:
        MLflow's ModelInfo, and the digest of the file that describes the detector.
    """
    import pandas as pd  # half a second, which the record of a finished run need not wait for

    with temporary_folder() as temporary:
        folder = temporary / ARTIFACT
        candidate.detector().save(folder)
        # Loaded again from its own files, the backbone shows that they are all there.
        detector = Detector.load(folder)
        width = detector.network.embed_dim
        example = pd.DataFrame({"feature": [np.full(width, width**-0.5).tolist()]})
        described = detector_digest(folder)
        info = load_mlflow().pyfunc.log_model(
            name="model",
            tags=process_tag(),
            python_model=str(PACKAGE / "register" / "mlflow_model.py"),
            artifacts={ARTIFACT: str(folder)},
            code_paths=[str(PACKAGE)],
            pip_requirements=requirements(),
            signature=signature(),
            # There is no image at hand for a model that takes nothing else.
            input_example=None if detector.needs_images else example,
        )
        return info, described


def _ensure_name(tracker: Tracker, name: str) -> None:
    try:
        tracker.client.create_registered_model(name)
    except load_mlflow().MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def signature() -> Any:
    """MLflow's description of the model: images or features in, verdicts out."""
    mlflow = load_mlflow()
    types = mlflow.types.schema
    inputs = [
        types.ColSpec("binary", "image", required=False),
        types.ColSpec(types.AnyType(), "feature", required=False),
    ]
    names = {"string": "string", "double": "double", "bool": "boolean"}
    outputs = [
        types.ColSpec(names[str(field.type)], field.name, required=not field.nullable)
        for field in VERDICTS
    ]
    return mlflow.models.ModelSignature(types.Schema(inputs), types.Schema(outputs))


def requirements() -> list[str]:
    """The pinned packages that the model runs with."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS]


def _tags(candidate: Candidate) -> dict[str, str]:
    return {
        "method": candidate.method,
        "score": candidate.score,
        **{f"score.{key}": f"{value:.17g}" for key, value in candidate.params.items()},
        "threshold": f"{candidate.threshold.value:.17g}",
        "target_tpr": f"{candidate.target_tpr:g}",
        "backbone": candidate.backbone.name,
        "classes": str(len(candidate.class_names)),
        **candidate.tags,
    }
