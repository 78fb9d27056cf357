"""The registered model on your images: `source=PATH` is a file or a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import main, seldom_collected

if TYPE_CHECKING:
    from pipelines.predict.stage import PredictConfig


def section() -> type[PredictConfig]:
    """What the job takes."""
    from pipelines.predict.stage import PredictConfig

    return PredictConfig


def predict(config: PredictConfig) -> None:
    """Print class, score, threshold and decision of every image."""
    from pipelines.predict.stage import run
    from pipelines.records import printable

    with seldom_collected():  # open_clip is imported where the first image is judged
        for found in run(config):
            if found.error is not None:
                print(printable(f"{found.path}: not judged, {found.error}"))
                continue
            decision = "OOD" if found.is_ood else "ID"
            print(
                printable(
                    f"{found.path}: {found.class_name}, score {found.score:.6g}, "
                    f"threshold {found.threshold:.6g}, {decision}"
                )
            )


if __name__ == "__main__":
    main("predict", section, predict, __doc__)
