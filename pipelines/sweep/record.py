"""What a run keeps of its sweep: configurations to run again, evidence, pictures, MLflow runs.

    runs/RUN/surfaces.parquet     every post-hoc setting of the chosen trials (`sweep.surfaces`)
    runs/RUN/best/METHOD.yaml     the chosen setting, with every score's chosen parameters
    runs/RUN/sweep/evidence.json  importance, Pareto front, edges, budget (`sweep.evidence`)
    runs/RUN/sweep/*.png          pictures (`sweep.figures`)

`python -m jobs.pipeline method=@runs/RUN/best/METHOD.yaml sweep=none` with the run's other words
gives the run's numbers again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipelines.config import plain, to_yaml
from pipelines.data import kept
from pipelines.data.storage import Storage
from pipelines.store.processes import temporary_folder
from pipelines.store.tracker import ChildRun, Tracker
from pipelines.sweep import evidence as sweep_evidence
from pipelines.sweep import surfaces
from pipelines.sweep.evidence import Evidence
from pipelines.sweep.result import Choice, Status, SweepResult, Trial

# MLflow's status of a run by that of a trial.
_STATUS: Mapping[Status, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "done": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}


@dataclass(frozen=True)
class Place:
    """Where the record of a sweep goes.

    Attributes:
        storage: which holds `runs/RUN/`.
        run: its name.
        tracker: the MLflow store.
        tracking_run: the run's own MLflow run.
    """

    storage: Storage
    run: str
    tracker: Tracker
    tracking_run: str


def keep(place: Place, result: SweepResult, table: pa.Table | None, words: str) -> None:
    """Write it all and log it to MLflow; where nothing was searched, the configurations alone.

    Args:
        place: where to.
        result: what was chosen.
        table: the surfaces of the chosen trials, where there are any.
        words: of the run's command line, which have to be given again.
    """
    storage = place.storage
    for name, choice in result.methods.items():
        text = best_yaml(name, choice, words)
        storage.write_bytes(text.encode(), "runs", place.run, "best", f"{name}.yaml")
    if table is not None:
        kept.write_table(storage, table, "runs", place.run, surfaces.FILE)
    if not result.trials:
        return
    from pipelines.plots import png
    from pipelines.sweep import figures as sweep_figures

    evidence = sweep_evidence.evidence(result, table)
    storage.write_bytes(evidence.to_json(), "runs", place.run, "sweep", "evidence.json")
    drawn = sweep_figures.drawn(result, table)
    pictures = {f"{name}.png": png(figure) for name, _, figure in drawn}
    for name, content in pictures.items():
        storage.write_bytes(content, "runs", place.run, "sweep", name)
    place.tracker.log_children(children(result), place.tracking_run)
    _log(place, result, evidence, pictures)


def best_yaml(name: str, choice: Choice, words: str) -> str:
    """A method's chosen setting as a file of the group `method`.

    Args:
        name: the method's, as in tables.
        choice: its chosen setting.
        words: of the run's command line, which have to be given again.
    """
    lines = [
        f"# {name}, chosen on validation data. Again, with whatever else the run was given:",
        f"# python -m jobs.pipeline method=@FILE sweep=none {words}",
    ]
    params = {score: values for score, values in choice.scores.items() if values}
    setting = {**plain(choice.setting), "score_params": params}
    return "\n".join(lines) + "\n" + to_yaml(setting)


def children(result: SweepResult) -> list[ChildRun]:
    """Every trial as a run of MLflow: a stopped one is KILLED there, with the reason as a tag."""
    return [
        ChildRun(
            f"sweep {trial.method} {trial.trial}",
            _STATUS[trial.status],
            trial.seconds,
            {"method": trial.method, **trial.settings},
            dict(_figures(trial)),
            {"trial.status": trial.status}
            | ({"trial.reason": trial.reason} if trial.reason else {}),
        )
        for trial in result.trials
    ]


def _figures(trial: Trial) -> Iterator[tuple[str, float]]:
    """What MLflow gets of a trial as metrics."""
    for score, figures in trial.scores.items():
        yield f"validation/auroc/{score}", figures.auroc
        yield f"validation/fpr/{score}", figures.fpr
        for key, value in figures.params.items():
            yield f"best/{score}/{key}", value
    if trial.accuracy is not None:
        yield "validation/accuracy", trial.accuracy


def _tags(result: SweepResult) -> Iterator[tuple[str, str]]:
    """What was chosen, as tags of the run's own MLflow run."""
    for name, choice in result.methods.items():
        for key, value in choice.chosen.items():
            yield f"chosen.{name}.{key}", str(value)
        for score, params in choice.scores.items():
            for key, number in params.items():
                yield f"chosen.{name}.{score}.{key}", f"{number:g}"


def _log(
    place: Place, result: SweepResult, evidence: Evidence, pictures: Mapping[str, bytes]
) -> None:
    """The choice as tags, the importance as metrics, the pictures as artifacts."""
    shares = {
        f"importance/{one.method}/{one.of.partition(' ')[0]}/{key}": share
        for one in evidence.importance
        for key, share in one.shares.items()
    }
    tags = dict(_tags(result))
    with (
        place.tracker.run("", run_id=place.tracking_run, tags=tags) as active,
        temporary_folder() as folder,
    ):
        active.log_metrics(shares)
        local = folder / "sweep"  # MLflow keeps a folder under its own name
        local.mkdir()
        for name, content in pictures.items():
            (local / name).write_bytes(content)
        active.log_artifact(local)
