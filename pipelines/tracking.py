"""The only user of MLflow's run API, and the stamp that says where numbers come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from pipelines.config import UserError
from pipelines.data.storage import Storage

PROJECT = Path(__file__).resolve().parent.parent
LIBRARIES = ("energy-ood", "torch", "open_clip_torch", "ray", "mlflow", "numpy")
# MLflow refuses larger batches, and longer values.
MAX_BATCH = 100
MAX_METRICS = 1000
MAX_VALUE = 6000


@dataclass(frozen=True)
class ActiveRun:
    """A run that is open: what is logged lands in it."""

    client: MlflowClient
    run_id: str

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat settings; the same ones again change nothing."""
        pairs = [Param(key, str(value)[:MAX_VALUE]) for key, value in params.items()]
        for start in range(0, len(pairs), MAX_BATCH):
            self.client.log_batch(self.run_id, params=pairs[start : start + MAX_BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers of one step together."""
        now = int(time.time() * 1000)
        values = [Metric(_key(key), float(value), now, step) for key, value in metrics.items()]
        for start in range(0, len(values), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=values[start : start + MAX_METRICS])

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a file or a folder with the run."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` as the file `name` with the run."""
        self.client.log_text(self.run_id, text, name)


@dataclass(frozen=True)
class Tracker:
    """One experiment of one MLflow store.

    Attributes:
        uri: of the store, for `mlflow ui --backend-store-uri` or `mlflow.set_tracking_uri`.
        experiment_id: of the experiment.
    """

    uri: str
    experiment_id: str

    @property
    def client(self) -> MlflowClient:
        """MLflow's client of this store."""
        return MlflowClient(self.uri, self.uri)

    def has(self, run_id: str) -> bool:
        """Whether the store knows that run."""
        try:
            self.client.get_run(run_id)
        except MlflowException:
            return False
        return True

    @contextmanager
    def run(
        self,
        name: str,
        *,
        run_id: str | None = None,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[ActiveRun]:
        """A run to log into; it ends as finished, failed or killed.

        Args:
            name: shown in MLflow; with `parent`, also what the run is found again by, so that a
                restart goes on in it.
            run_id: open this run again.
            parent: the run that this one belongs to.
            tags: further facts, shown with the run.

        Raises:
            UserError: where the store has no run `run_id`.
        """
        if run_id is not None and not self.has(run_id):
            raise UserError(f"{self.uri}: no run {run_id}; was the store changed or deleted?")
        run_id = run_id or self._child(name, parent) or self._create(name, parent)
        active = ActiveRun(self.client, run_id)
        self.client.update_run(run_id, status="RUNNING")
        pairs = [RunTag(key, str(value)[:MAX_VALUE]) for key, value in (tags or {}).items()]
        self.client.log_batch(run_id, tags=pairs)
        status = "KILLED"
        try:
            yield active
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self.client.set_terminated(run_id, status)

    @contextmanager
    def current(self, run_id: str) -> Iterator[None]:
        """Make this store and run MLflow's current ones, for its functions that ask for them."""
        before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        try:
            with mlflow.start_run(run_id=run_id):
                yield
        finally:
            mlflow.set_tracking_uri(before[0])
            mlflow.set_registry_uri(before[1])

    def _create(self, name: str, parent: str | None) -> str:
        tags = {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return str(run.info.run_id)

    def _child(self, name: str, parent: str | None) -> str | None:
        if parent is None:
            return None
        query = (
            f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{MLFLOW_RUN_NAME}` = '{name}'"
        )
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return str(found[0].info.run_id) if found else None


def open_tracker(
    storage: Storage, *, tracking_uri: str | None = None, experiment: str = "energy-ood"
) -> Tracker:
    """Open the MLflow store, by default SQLite and a folder of artifacts below `storage`.

    Raises:
        UserError: where the storage is remote and no `tracking_uri` is given, or the store
            cannot be opened.
    """
    quiet()
    location = None
    if tracking_uri is None:
        if not storage.is_local:
            raise UserError(
                f"storage={storage.root}: MLflow's database needs a folder of this machine; "
                "give a server, tracking_uri=http://HOST:5000"
            )
        storage.local().mkdir(parents=True, exist_ok=True)
        tracking_uri = f"sqlite:///{storage.local('mlflow.db')}"
        location = storage.local("artifacts").as_uri()
    try:
        return Tracker(tracking_uri, _experiment(tracking_uri, experiment, location))
    except (MlflowException, OSError) as error:
        raise UserError(f"tracking_uri={tracking_uri}: not opened ({error})") from None


def _experiment(uri: str, name: str, location: str | None) -> str:
    client = MlflowClient(uri, uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def quiet() -> None:
    """Keep MLflow's notes (migrations, progress bars, usage reports) off the user's terminal."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns that pip, which uv's environments lack, has no version to write down.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


def stamp(**facts: Any) -> dict[str, str]:
    """Where a number comes from: commit, lock file, versions; and `facts`, as strings."""
    lock = PROJECT / "requirements.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "unknown"
    return {
        **_commit(),
        "lock": digest[:16],
        "python": platform.python_version(),
        **{f"version.{name}": _version(name) for name in LIBRARIES},
        **{key: str(value) for key, value in facts.items()},
    }


def _commit() -> dict[str, str]:
    try:
        sha = _git("rev-parse", "HEAD")
        dirty = bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return {"git.commit": "unknown", "git.dirty": "unknown"}
    return {"git.commit": sha, "git.dirty": str(dirty).lower()}


def _git(*words: str) -> str:
    # The project's own repository, or none: never one that an installed copy happens to lie in.
    if not (PROJECT / ".git").exists():
        raise FileNotFoundError(PROJECT / ".git")
    done = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _key(name: str) -> str:
    """A name that MLflow takes: it allows no parentheses and no + in a metric's name."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)
