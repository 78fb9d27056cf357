"""The registered model on your images: `source=PATH` is a file or a folder."""

from __future__ import annotations

from jobs import main
from pipelines.predict.stage import PredictConfig, run


def predict(config: PredictConfig) -> None:
    """Print class, score, threshold and decision of every image."""
    for found in run(config):
        if found.error is not None:
            print(f"{found.path}: not judged, {found.error}")
            continue
        decision = "OOD" if found.is_ood else "ID"
        print(
            f"{found.path}: {found.class_name}, score {found.score:.6g}, "
            f"threshold {found.threshold:.6g}, {decision}"
        )


if __name__ == "__main__":
    main("predict", PredictConfig, predict, __doc__ or "")
