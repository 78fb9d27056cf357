"""What the MLflow store holds now: the version that an alias points to, and what was left behind.

A local store is read without MLflow, which takes seconds to import; a server is asked by it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipelines.config import UserError
from pipelines.config.secrets import mask_uri
from pipelines.data.storage import Storage
from pipelines.store import database
from pipelines.store.database import RegisteredVersion, local_path
from pipelines.store.errors import said_clearly
from pipelines.store.leases import at_work
from pipelines.store.processes import Process
from pipelines.store.server import refuse_silent
from pipelines.store.tracker import (
    PROCESS,
    Tracker,
    current_store,
    is_missing,
    load_mlflow,
    open_tracker,
    store_errors,
    store_uri,
)

# Tags of a version: digests of all of its files, and of the one that describes the detector.
FILES, DETECTOR = "files", "detector"
# Where the description lies in the folder of a model.
DESCRIPTION = ("artifacts", "detector", "detector.json")
# What reading a model writes into its folder.
_WRITTEN_LATER = ("__pycache__", "registered_model_meta")


def version_of(
    storage: Storage, tracking_uri: str | None, name: str, which: str
) -> RegisteredVersion | None:
    """A version of a registered model as it is now; None where there is none.

    Args:
        storage: that holds the local store.
        tracking_uri: another store.
        name: of the registered model.
        which: `@ALIAS`, or the version's number.
    """
    if tracking_uri is None:
        return database.version_of(storage, name, which)
    refuse_silent(tracking_uri)
    mlflow = load_mlflow()
    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    is_alias, bare = which.startswith("@"), which.removeprefix("@")
    get = client.get_model_version_by_alias if is_alias else client.get_model_version
    try:
        found = get(name, bare)
        location = client.get_model_version_download_uri(name, found.version)
    except mlflow.MlflowException as error:
        if is_missing(error):
            return None
        raise
    ready = found.status == "READY"
    return RegisteredVersion(str(found.version), ready, str(location), dict(found.tags))


def model_folder(storage: Storage, tracking_uri: str | None, model: str) -> Path:
    """The files of a registered model, downloaded if they are elsewhere.

    Args:
        storage: that holds the local store.
        tracking_uri: another store.
        model: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: where there is no such model yet, where the storage was moved, or where the
            files are not those that were registered.
    """
    uri = store_uri(storage, tracking_uri)
    if tracking_uri is None:
        database.refuse_moved(storage)
    name, which = _parts(model)
    with store_errors(uri) if tracking_uri else nullcontext():
        found = version_of(storage, tracking_uri, name, which)
        if found is None:
            raise UserError(
                f"{model}: no such model in {mask_uri(uri)} yet: run python -m jobs.pipeline first"
            )
        folder = found.folder or _download(uri, name, found)
    described = folder.joinpath(*DESCRIPTION)
    if not described.is_file() or _sha256(described) != found.tags.get(DETECTOR):
        raise UserError(
            f"{model}: {described} is missing or not as it was registered; this model judges "
            "nothing. Restore it: run python -m jobs.register with the run's words"
        )
    return folder


def _parts(model: str) -> tuple[str, str]:
    """The name and `@ALIAS`, or the number, of a model's URI."""
    name, alias, which = model.removeprefix("models:/").partition("@")
    if not alias:
        name, _, which = name.rpartition("/")
    if not name or not which:
        raise UserError(f"model={model}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    return name, alias + which


def _download(uri: str, name: str, version: RegisteredVersion) -> Path:
    with current_store(uri):
        model = f"models:/{name}/{version.version}"
        return Path(load_mlflow().artifacts.download_artifacts(model))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(folder: Path) -> str:
    """A digest of a model's files and their names; empty where there is no such folder."""
    total = hashlib.sha256()
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    for path in paths:
        name = path.relative_to(folder)
        if any(part in _WRITTEN_LATER for part in name.parts):
            continue
        total.update(f"{name.as_posix()}\0{_sha256(path)}\n".encode())
    return total.hexdigest() if paths else ""


def has_files(version: RegisteredVersion, uri: str, name: str) -> bool:
    """Whether the files of a version are as they were written; on a server, whether they exist."""
    if version.folder is not None:
        return files_digest(version.folder) == version.tags.get(FILES)
    with current_store(uri):
        mlflow = load_mlflow()
        try:
            found = mlflow.artifacts.list_artifacts(f"models:/{name}/{version.version}")
        except mlflow.MlflowException:
            return False
    return any(Path(file.path).name == "MLmodel" for file in found)


@contextmanager
def working(storage: Storage, tracking_uri: str | None) -> Iterator[None]:
    """This process works in `storage` and in its MLflow store during the block.

    First, both are looked at: a server that does not answer, a storage that is no folder or that
    was moved are refused, and what killed processes left is removed. Whatever the file system or
    the store refuses on the way ends the block with one line.

    Raises:
        UserError: for all of these.
    """
    with said_clearly(storage):
        if tracking_uri is None:
            database.refuse_moved(storage)
        else:
            open_tracker(storage, tracking_uri=tracking_uri)
        with at_work(storage, lambda: close_killed(storage, tracking_uri)):
            yield


def close_killed(storage: Storage, tracking_uri: str | None) -> None:
    """Close the runs of processes that are gone, and remove their models without a version."""
    if tracking_uri is None and not database.exists(storage):
        return
    tracker = open_tracker(storage, tracking_uri=tracking_uri)
    client = tracker.client
    for run in _all(client.search_runs, [tracker.experiment_id], "attributes.status = 'RUNNING'"):
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
    if folder is not None and folder.is_relative_to(tracker.storage.root):
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
