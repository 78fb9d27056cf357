"""What the MLflow store holds now: the version that an alias points to, and what was left behind.

A local store is read without MLflow, which takes seconds to import; a server is asked by it.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.store import database
from pipelines.store.database import RegisteredVersion, local_path
from pipelines.store.processes import Process
from pipelines.store.server import refuse_silent
from pipelines.tracking import (
    PROCESS,
    Tracker,
    current_store,
    is_missing,
    load_mlflow,
    open_tracker,
    store_uri,
)

# What reading a model writes into its folder.
_WRITTEN_LATER = ("__pycache__", "registered_model_meta")


def version_of(
    storage: Storage, tracking_uri: str | None, name: str, alias: str
) -> RegisteredVersion | None:
    """The version that an alias of a registered model points to; None where there is none."""
    if tracking_uri is None:
        return database.version_of(storage, name, alias)
    refuse_silent(tracking_uri)
    mlflow = load_mlflow()
    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    try:
        found = client.get_model_version_by_alias(name, alias)
        location = client.get_model_version_download_uri(name, found.version)
    except mlflow.MlflowException as error:
        if is_missing(error):
            return None
        raise
    ready = found.status == "READY"
    return RegisteredVersion(str(found.version), ready, str(location), dict(found.tags))


def files_digest(folder: Path) -> str:
    """A digest of a model's files and their names; empty where there is no such folder."""
    total = hashlib.sha256()
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    for path in paths:
        name = path.relative_to(folder)
        if any(part in _WRITTEN_LATER for part in name.parts):
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{name.as_posix()}\0{content}\n".encode())
    return total.hexdigest() if paths else ""


def has_files(version: RegisteredVersion, tracking_uri: str | None, name: str) -> bool:
    """Whether the files of a version are as they were written; on a server, whether they exist."""
    if version.folder is not None:
        return files_digest(version.folder) == version.tags.get("files")
    assert tracking_uri is not None  # a local store keeps its files here
    with current_store(tracking_uri):
        mlflow = load_mlflow()
        try:
            found = mlflow.artifacts.list_artifacts(f"models:/{name}/{version.version}")
        except mlflow.MlflowException:
            return False
    return any(Path(file.path).name == "MLmodel" for file in found)


def close_killed(storage: Storage, tracking_uri: str | None) -> None:
    """Close the runs of processes that are gone, and remove their models without a version."""
    if tracking_uri is None and not database.exists(storage):
        return
    tracker = open_tracker(storage, tracking_uri=tracking_uri)
    client = tracker.client
    for run in _all(
        client.search_runs, [tracker.experiment_id], "attributes.status = 'RUNNING'"
    ):
        if _is_gone(run.data.tags):
            client.set_terminated(run.info.run_id, "KILLED")
    for model in _all(client.search_logged_models, [tracker.experiment_id]):
        source = f"source_path = 'models:/{model.model_id}'"
        if _is_gone(model.tags) and not client.search_model_versions(source):
            client.delete_logged_model(model.model_id)
            _remove_files(tracker, model)


def _remove_files(tracker: Tracker, model: Any) -> None:
    """Remove a deleted model's files, where they lie in the tracker's storage."""
    folder = local_path(model.artifact_location)
    root = Path(tracker.storage.root)
    if tracker.uri == store_uri(tracker.storage, None) and folder and folder.is_relative_to(root):
        shutil.rmtree(folder.parent if folder.parent.name == model.model_id else folder)


def _all(search: Any, *query: Any) -> list[Any]:
    """Every page of a search."""
    found, token = [], None
    while True:
        page = search(*query, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _is_gone(tags: dict[str, str]) -> bool:
    """Whether the process that worked on something has ended; nobody else's work counts."""
    if PROCESS not in tags:
        return False
    try:
        return Process.from_json(tags[PROCESS].encode(), PROCESS).is_gone
    except UserError:
        return False
