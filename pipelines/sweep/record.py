"""What a run keeps of its sweep: configurations to run again, evidence, pictures, MLflow runs.

    runs/RUN/best/METHOD.yaml     the chosen setting, with every score's chosen parameters
    runs/RUN/sweep/evidence.json  importance, Pareto front, edges, budget (`sweep_evidence`)
    runs/RUN/sweep/*.png          pictures (`sweep_figures`)

`python -m jobs.pipeline methods=@runs/RUN/best/METHOD.yaml sweep=none` with the run's other words
gives the run's numbers again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.config import to_yaml
from pipelines.data.storage import Storage
from pipelines.sweep import evidence as sweep_evidence
from pipelines.tracking import ChildRun, Tracker

SURFACES = "surfaces.parquet"
_STATUS: Mapping[str, Any] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


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


def keep(place: Place, sweep: Mapping[str, Any], words: str) -> None:
    """Write it all and log it to MLflow; where nothing was searched, the configurations alone.

    Args:
        place: where to; the surfaces, if any, are in storage already.
        sweep: the content of `sweep.json`.
        words: of the run's command line, which have to be given again.
    """
    storage = place.storage
    for name, found in sweep["methods"].items():
        text = best_yaml(name, found, words)
        storage.write_bytes(text.encode(), "runs", place.run, "best", f"{name}.yaml")
    if not sweep.get("trials"):
        return
    from pipelines.plots import png
    from pipelines.sweep import figures as sweep_figures

    table = surfaces(storage, place.run)
    facts = sweep_evidence.evidence(sweep, table)
    storage.write_json(facts, "runs", place.run, "sweep", "evidence.json")
    pictures = {f"{name}.png": png(figure) for name, _, figure in sweep_figures.drawn(sweep, table)}
    for name, content in pictures.items():
        storage.write_bytes(content, "runs", place.run, "sweep", name)
    _log(place, sweep, facts, pictures)


def surfaces(storage: Storage, run: str) -> pa.Table | None:
    """The post-hoc surfaces of the chosen trials, where the sweep wrote them."""
    if not storage.exists("runs", run, SURFACES):
        return None
    return storage.read_table("runs", run, SURFACES)


def best_yaml(name: str, found: Mapping[str, Any], words: str) -> str:
    """A method's chosen setting as a file of the group `method`.

    Args:
        name: the method's, as in tables.
        found: its entry of `methods` in `sweep.json`.
        words: of the run's command line, which have to be given again.
    """
    lines = [
        f"# {name}, chosen on validation data. Again, with whatever else the run was given:",
        f"# python -m jobs.pipeline methods=@FILE sweep=none {words}",
    ]
    params = {score: values for score, values in found["scores"].items() if values}
    setting = {**found["setting"], "score_params": params}
    return "\n".join(lines) + "\n" + to_yaml(setting)


def children(sweep: Mapping[str, Any]) -> list[ChildRun]:
    """Every trial as a run of MLflow: a stopped one is KILLED there, with the reason as a tag."""
    found = []
    for trial in sweep_evidence.trials(sweep):
        figures = {
            **{f"validation/auroc/{score}": value for score, value in trial.auroc.items()},
            **{f"validation/fpr/{score}": value for score, value in trial.fpr.items()},
            **{
                f"best/{score}/{key}": value
                for score, params in trial.params.items()
                for key, value in params.items()
            },
        }
        if trial.accuracy is not None:
            figures["validation/accuracy"] = trial.accuracy
        found.append(
            ChildRun(
                f"sweep {trial.method} {trial.number}",
                _STATUS[trial.status],
                trial.seconds,
                {"method": trial.method, **trial.settings},
                figures,
                {"trial.status": trial.status}
                | ({"trial.reason": trial.reason} if trial.reason else {}),
            )
        )
    return found


def _log(
    place: Place, sweep: Mapping[str, Any], facts: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> None:
    place.tracker.log_children(children(sweep), place.tracking_run)
    chosen: dict[str, str] = {}
    for name, found in sweep["methods"].items():
        chosen |= {f"chosen.{name}.{key}": str(value) for key, value in found["chosen"].items()}
        chosen |= {
            f"chosen.{name}.{score}.{key}": f"{value:g}"
            for score, params in found["scores"].items()
            for key, value in params.items()
        }
    shares = {
        f"importance/{one['method']}/{one['of'].partition(' ')[0]}/{key}": share
        for one in facts["importance"]
        for key, share in one["shares"].items()
    }
    with (
        place.tracker.run("", run_id=place.tracking_run, tags=chosen) as active,
        tempfile.TemporaryDirectory(prefix="energy-ood-") as folder,
    ):
        active.log_metrics(shares)
        local = Path(folder, "sweep")  # MLflow keeps a folder under its own name
        local.mkdir()
        for name, content in pictures.items():
            (local / name).write_bytes(content)
        active.log_artifact(local)
