"""The confidence of a deployed model: its softmax at a temperature that fits ID validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.heads import Predictor
from pipelines.ood import expected_calibration_error, msp
from pipelines.ood.calibration import fit_temperature

# Features (N, D) of known images, their local features (N, P, D) or None, and classes (N,).
Labelled: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.int64]]


@dataclass(frozen=True)
class Calibration:
    """How a model's confidence was made as high as its accuracy.

    Attributes:
        temperature: of the softmax, fitted to ID validation images; 1: the softmax as it is.
        before, after: expected calibration error on ID test images at 1 and at that temperature.
    """

    temperature: float = 1.0
    before: float | None = None
    after: float | None = None

    @classmethod
    def of(cls, predictor: Predictor, validation: Labelled, test: Labelled) -> Calibration:
        """Fitted to the validation images, measured on the test images."""
        (known, known_labels), (logits, labels) = (
            (predictor.class_logits(predictor.similarity(features, local)), torch.tensor(classes))
            for features, local, classes in (validation, test)
        )
        temperature = fit_temperature(known, known_labels)
        right = logits.argmax(dim=1) == labels
        before, after = (
            expected_calibration_error(msp(logits, tau), right) for tau in (1.0, temperature)
        )
        return cls(temperature, before, after)

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the version; none where nothing was fitted."""
        if self.before is None:
            return {}
        return {
            "temperature": f"{self.temperature:.6g}",
            "calibration_error_before": f"{self.before:.6g}",
            "calibration_error": f"{self.after:.6g}",
        }
