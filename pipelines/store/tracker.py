"""The experiment tracker: the only user of MLflow's run API and of its model registry's files."""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.config import UserError
from pipelines.config.secrets import mask, mask_uri
from pipelines.data.storage import Storage
from pipelines.store import database
from pipelines.store.errors import said_clearly
from pipelines.store.locks import locked
from pipelines.store.processes import this_process
from pipelines.store.server import refuse_silent

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow refuses larger batches, and longer values.
MAX_BATCH = 100
MAX_METRICS = 1000
MAX_VALUE = 6000
# MLflow's tag for the run that a run belongs to; its page shows the two as a tree.
PARENT = "mlflow.parentRunId"
# Our tag for the process that works on a run or a model: once it is gone, so is its work.
PROCESS = "process"
# MLflow writes them when its current store is set, for the processes that it starts.
STORE_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")


@dataclass(frozen=True)
class ChildRun:
    """A run that is over, to be kept below its parent.

    Attributes:
        name: what it is found again by.
        status: MLflow's word: FINISHED, FAILED or KILLED.
        seconds: how long it took.
        params: settings; metrics: numbers; tags: further facts.
    """

    name: str
    status: Literal["FINISHED", "FAILED", "KILLED"]
    seconds: float = 0.0
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ActiveRun:
    """A run that is open: what is logged lands in it."""

    client: MlflowClient
    run_id: str

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat settings; the same ones again change nothing."""
        entities = load_mlflow().entities
        pairs = [entities.Param(_key(k), _value(v)) for k, v in params.items()]
        for start in range(0, len(pairs), MAX_BATCH):
            self.client.log_batch(self.run_id, params=pairs[start : start + MAX_BATCH])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set facts that are shown with the run."""
        entities = load_mlflow().entities
        pairs = [entities.RunTag(_key(k), _value(v)) for k, v in tags.items()]
        for start in range(0, len(pairs), MAX_BATCH):
            self.client.log_batch(self.run_id, tags=pairs[start : start + MAX_BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers of one step together."""
        entities, now = load_mlflow().entities, int(time.time() * 1000)
        values = [entities.Metric(_key(k), float(v), now, step) for k, v in metrics.items()]
        for start in range(0, len(values), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=values[start : start + MAX_METRICS])

    def log_series(self, series: Mapping[int, Mapping[str, float]]) -> None:
        """Log the numbers of several steps together; a step that the run has is left as it is."""
        entities, now = load_mlflow().entities, int(time.time() * 1000)
        known: set[int] = set()
        for name in {_key(name) for figures in series.values() for name in figures}:
            known |= {m.step for m in self.client.get_metric_history(self.run_id, name)}
        values = [
            entities.Metric(_key(name), float(value), now, step)
            for step, figures in sorted(series.items())
            if step not in known
            for name, value in figures.items()
        ]
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
        storage: that the store belongs to, or that is kept beside it.
    """

    uri: str
    experiment_id: str
    storage: Storage

    @property
    def client(self) -> MlflowClient:
        """MLflow's client of this store."""
        client: MlflowClient = load_mlflow().MlflowClient(self.uri, self.uri)
        return client

    def has(self, run_id: str) -> bool:
        """Whether the store has that run and it was not deleted."""
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except load_mlflow().MlflowException as error:
            if is_missing(error):
                return False
            raise

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
            raise UserError(
                f"{mask_uri(self.uri)}: no run {run_id}; was the store changed or deleted?"
            )
        name = name.replace("'", "")  # MLflow's search has no way to quote it
        run_id = run_id or self._child(name, parent) or self._create(name, parent)
        active = ActiveRun(self.client, run_id)
        active.set_tags({**(tags or {}), **process_tag()})
        self.client.update_run(run_id, status="RUNNING")
        status = "KILLED"
        try:
            yield active
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self.client.set_terminated(run_id, status)

    def log_children(self, children: Sequence[ChildRun], parent: str) -> None:
        """Keep runs that are over below `parent`, in few transactions.

        One that is there already with the same status is left as it is, so a restart repeats
        nothing.
        """
        known = self._children(parent)
        for child in children:
            name = child.name.replace("'", "")
            run_id, status = known.get(name, ("", ""))
            if status == child.status:
                continue
            tags = {_key(key): _value(value) for key, value in child.tags.items()}
            end = int(time.time() * 1000)
            if not run_id:
                created = self.client.create_run(
                    self.experiment_id,
                    start_time=end - int(1000 * child.seconds),
                    tags={**tags, PARENT: parent, **process_tag()},
                    run_name=name,
                )
                run_id, tags = created.info.run_id, {}
            self._log_all(run_id, child, tags)
            self.client.set_terminated(run_id, child.status, end)

    def _log_all(self, run_id: str, child: ChildRun, tags: Mapping[str, str]) -> None:
        """Settings, numbers and facts in one batch, or in as many as MLflow's limits ask for."""
        entities, now = load_mlflow().entities, int(time.time() * 1000)
        params = [entities.Param(_key(k), _value(v)) for k, v in child.params.items()]
        metrics = [entities.Metric(_key(k), float(v), now, 0) for k, v in child.metrics.items()]
        pairs = [entities.RunTag(key, value) for key, value in tags.items()]
        for start in range(0, max(len(params), len(metrics), len(pairs)), MAX_BATCH):
            part = slice(start, start + MAX_BATCH)
            self.client.log_batch(run_id, metrics[part], params[part], pairs[part])

    def _children(self, parent: str) -> dict[str, tuple[str, str]]:
        """Run id and status of the children of `parent`, by name."""
        query, token = f"tags.`{PARENT}` = '{parent}'", None
        found: dict[str, tuple[str, str]] = {}
        while True:
            page = self.client.search_runs([self.experiment_id], query, page_token=token)
            found |= {r.info.run_name: (r.info.run_id, r.info.status) for r in page}
            token = page.token
            if not token:
                return found

    @contextmanager
    def current(self, run_id: str) -> Iterator[None]:
        """Make this store and run MLflow's current ones, for its functions that ask for them."""
        ActiveRun(self.client, run_id).set_tags(process_tag())
        with current_store(self.uri), load_mlflow().start_run(run_id=run_id):
            yield

    def _create(self, name: str, parent: str | None) -> str:
        tags = {**({PARENT: parent} if parent else {}), **process_tag()}
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return str(run.info.run_id)

    def _child(self, name: str, parent: str | None) -> str | None:
        if parent is None:
            return None
        query = f"tags.`{PARENT}` = '{parent}' and attributes.run_name = '{name}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return str(found[0].info.run_id) if found else None


def process_tag() -> dict[str, str]:
    """The tag that says which process works on something."""
    return {PROCESS: this_process().model_dump_json()}


def open_tracker(
    storage: Storage, *, tracking_uri: str | None = None, experiment: str = "energy-ood"
) -> Tracker:
    """Open the MLflow store, by default SQLite and a folder of artifacts below `storage`.

    Raises:
        UserError: where the storage is remote and no `tracking_uri` is given, where it was moved,
            where the server does not answer, or the store cannot be opened.
    """
    uri = store_uri(storage, tracking_uri)
    if tracking_uri is not None:
        refuse_silent(uri)
        with store_errors(uri):
            return Tracker(uri, _experiment(uri, experiment, None), storage)
    database.refuse_moved(storage)
    with said_clearly(storage), locked(storage, "mlflow"):
        _ensure_database(storage)
        location = storage.local(database.ARTIFACTS).as_uri()
        return Tracker(uri, _experiment(uri, experiment, location), storage)


def _ensure_database(storage: Storage) -> None:
    """Create MLflow's tables where they are not yet: all of them at once, also when killed."""
    if database.exists(storage):
        return
    load_mlflow()
    utils: Any = importlib.import_module("mlflow.store.db.utils")
    with storage.writing(database.FILE, replace=False) as path:
        engine = utils.create_sqlalchemy_engine(f"sqlite:///{path}")
        try:
            utils._initialize_tables(engine)
        finally:
            engine.dispose()


def store_uri(storage: Storage, tracking_uri: str | None) -> str:
    """The address of the MLflow store: `tracking_uri`, or the SQLite file below `storage`.

    Raises:
        UserError: where the storage is remote and no `tracking_uri` is given.
    """
    if tracking_uri is not None:
        return tracking_uri
    if not storage.is_local:
        raise UserError(
            f"storage={storage.root}: MLflow's database needs a folder of this machine; "
            "give a server, tracking_uri=http://HOST:5000"
        )
    return f"sqlite:///{storage.local(database.FILE)}"


@contextmanager
def current_store(uri: str) -> Iterator[None]:
    """Make a store MLflow's current one for a while; `models:/` is looked up nowhere else."""
    mlflow = load_mlflow()
    inherited = {name: os.environ.get(name) for name in STORE_VARIABLES}
    tracking = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    registry = mlflow.get_registry_uri()
    follows = registry == mlflow.get_tracking_uri()  # as it does where nobody set it
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(tracking)
        mlflow.set_registry_uri(None if follows else registry)
        for name, value in inherited.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """What the store refuses ends the block with one line that names it."""
    try:
        yield
    except (load_mlflow().MlflowException, OSError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"MLflow store {mask_uri(uri)}: {mask(line)}") from None


def _experiment(uri: str, name: str, location: str | None) -> str:
    client = load_mlflow().MlflowClient(uri, uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except load_mlflow().MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # somebody else was first
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def is_missing(error: Any) -> bool:
    """Whether an MlflowException says that something is not there."""
    # A missing alias comes as an invalid parameter.
    codes = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
    return error.error_code in codes or "not found" in str(error)


def load_mlflow() -> Any:
    """MLflow, imported when it is first needed (seconds) and kept off the user's terminal.

    No usage report is sent unless the user's environment asks for it
    (MLFLOW_DISABLE_TELEMETRY=false); MLflow decides that while it is imported.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings():
        # About a type hint in MLflow's own code.
        warnings.filterwarnings("ignore", ".*[Aa]ny type hint", UserWarning)
        import mlflow
        import mlflow.pyfunc
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Its errors come as exceptions; here it prints their tracebacks too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # It warns that pip, which uv's environments lack, has no version to write down.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    return mlflow


def _value(value: Any) -> str:
    """A setting or a fact as it is kept: without credentials, as long as MLflow takes it."""
    return mask(str(value))[:MAX_VALUE]


def _key(name: str) -> str:
    """`name` in the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-./: " else "_" for c in name)
