"""What the tests of tracking, registry and prediction share."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import pytest

from pipelines.data.storage import Storage
from pipelines.tracking import Tracker, open_tracker


@dataclass(frozen=True)
class Store:
    storage: Storage
    tracker: Tracker
    said: str  # what creating it put on the terminal


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One MLflow database for the session: creating it takes seconds."""
    storage = Storage.open(str(tmp_path_factory.mktemp("mlflow")))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        tracker = open_tracker(storage)
    return Store(storage, tracker, said.getvalue())
