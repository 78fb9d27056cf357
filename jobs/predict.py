"""The registered model on your images: `source=PATH` is a file or a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import main, seldom_collected

if TYPE_CHECKING:
    from pipelines.predict.stage import PredictConfig, Prediction


def section() -> type[PredictConfig]:
    """What the job takes."""
    from pipelines.predict.stage import PredictConfig

    return PredictConfig


def predict(config: PredictConfig) -> None:
    """Print class, score, threshold and decision of every image, and how many are unknown.

    With explain=true also why, and what of an explanation the model cannot give.
    """
    from pipelines.predict.stage import num_unknown, run
    from pipelines.records import printable

    judged = []
    with seldom_collected():  # open_clip is imported where the first image is judged
        for found in run(config):
            judged.append(found)
            print(printable(f"{found.path}: {_verdict(found)}"))
            for line in _why(found):
                print(printable(f"  {line}"))
        unknown = num_unknown(judged, config.false_alarms)
    if unknown is not None and len(judged) > 1:
        print(
            f"{unknown} of {len(judged)} images are unknown by their p-values; "
            f"on average at most {config.false_alarms:.3g} of these are ID"
        )
    for line in dict.fromkeys(line for found in judged for line in _missing(found)):
        print(printable(line))


def _why(found: Prediction) -> list[str]:
    """The parts of an explanation, a line each; none where there is none."""
    why = found.explanation
    if why is None:
        return []
    classes = ", ".join(f"{one.name} {100 * one.value:.1f} %" for one in why.classes)
    words = ", ".join(f"{one.name} {one.value:.3f}" for one in why.words)
    nearest = ", ".join(f"{one.key} ({one.class_name}) {one.cosine:.3f}" for one in why.nearest)
    lines = [f"classes  {classes}"]
    lines += [f"words    {words}"] if words else []
    lines += [f"nearest  {nearest}"] if nearest else []
    if why.patches is not None:
        lines.append(f"map      {found.map_file}: {why.patches.caption}; yellow is high, like ID")
    return lines


def _missing(found: Prediction) -> tuple[str, ...]:
    return () if found.explanation is None else found.explanation.missing


def _verdict(found: Prediction) -> str:
    if found.error is not None:
        return f"not judged, {found.error}"
    p_value = "" if found.p_value is None else f"p-value {found.p_value:.3g}, "
    return (
        f"{found.class_name}, score {found.score:.6g}, threshold {found.threshold:.6g}, "
        f"{p_value}{'OOD' if found.is_ood else 'ID'}"
    )


if __name__ == "__main__":
    main("predict", section, predict, __doc__)
