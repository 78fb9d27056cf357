"""What the stage register writes: `register.json`, the version in the model registry."""

from __future__ import annotations

from typing import ClassVar

from pipelines.evaluate.metrics import Threshold
from pipelines.records import StoredRecord


class RegisterResult(StoredRecord):
    """The content of `register.json`: a version in the registry.

    Attributes:
        name: in the registry.
        model_version: its number.
        uri: what `mlflow.pyfunc.load_model` takes.
        method, score: of the detector.
        params: the score's parameters.
        threshold: a lower score is out of distribution.
        content: a digest of what decides the model's verdicts.
    """

    LAYOUT: ClassVar[int] = 2

    name: str
    model_version: str
    uri: str
    method: str
    score: str
    params: dict[str, int | float]
    threshold: Threshold
    content: str
