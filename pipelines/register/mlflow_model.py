"""The model as MLflow keeps it (models-from-code): images or features in, verdicts out.

`mlflow.pyfunc.load_model("models:/energy-ood@champion").predict(frame)` takes a DataFrame with a
column `image` (encoded bytes) or `feature` (D numbers, unit length) and returns one with the
columns of `pipelines.register.detector.VERDICTS`. MLflow runs this file to get the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
import pyarrow as pa
from mlflow.pyfunc import PythonModel  # type: ignore[attr-defined]
from numpy.typing import NDArray

from pipelines.register.detector import ARTIFACT, Detector


class RegisteredModel(PythonModel):
    """A `Detector` behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Load the detector from the model's own artifacts."""
        self.detector = Detector.load(Path(context.artifacts[ARTIFACT]))

    def predict(
        self,
        context: Any,  # noqa: ARG002 - the interface
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Verdicts, one row for each row of `model_input`.

        Raises:
            ValueError: where it has not exactly one of the columns `image` and `feature`.
        """
        columns = [name for name in ("image", "feature") if name in model_input.columns]
        if columns == ["image"]:
            verdicts = self.detector.judge_images(list(model_input["image"]))
        elif columns == ["feature"]:
            if self.detector.needs_local:
                raise ValueError(
                    "this model reads local features of each image too: give the column image "
                    "(encoded bytes)"
                )
            verdicts = self.detector.judge_features(_matrix(list(model_input["feature"])))
        else:
            raise ValueError(
                "give one of the columns image (encoded bytes) and feature (numbers); "
                f"came: {', '.join(map(str, model_input.columns)) or 'none'}"
            )
        nullable = {pa.bool_(): pd.BooleanDtype()}
        return verdicts.to_pandas(types_mapper=nullable.get)


def _matrix(rows: list[Any]) -> NDArray[np.float32]:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"feature: rows of different lengths ({lengths})")
    return np.asarray(rows, dtype=np.float32)


mlflow.models.set_model(RegisteredModel())
