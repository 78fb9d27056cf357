"""A tracking server that does not answer: refused at once, before any work."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.store.server import refuse_silent
from tests.ray.commands import job_here
from tests.store.conftest import one_line, pipeline


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def other_server() -> Iterator[str]:
    """A server that knows no page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["nobody", "silent"])
def test_it_is_asked_first_with_a_time_limit(
    server: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = request.getfixturevalue(server)
    began = time.monotonic()
    line = one_line(pipeline(tmp_path / "storage", f"tracking_uri={uri}"))
    assert time.monotonic() - began < 20
    assert f"tracking_uri={uri}: no MLflow server answers there within 5 s" in line
    assert not (tmp_path / "storage").exists()


def test_a_finished_run_names_no_champion_of_a_dead_server(storage: Path, nobody: str) -> None:
    done = pipeline(storage, f"tracking_uri={nobody}")
    assert "no MLflow server answers" in one_line(done)
    assert "champion" not in done.stdout


def test_predict_asks_it_too(tmp_path: Path, nobody: str) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    words = (f"source={tmp_path}/a.png", f"storage={tmp_path}", f"tracking_uri={nobody}")
    assert "no MLflow server answers" in one_line(job_here("predict", *words))


def test_one_that_is_no_mlflow_is_one_line(tmp_path: Path, other_server: str) -> None:
    line = one_line(pipeline(tmp_path / "storage", f"tracking_uri={other_server}"))
    assert f"MLflow store {other_server}: " in line
    assert "404" in line


def test_a_password_is_not_sent_and_not_said(silent: str, other_server: str) -> None:
    refuse_silent(other_server.replace("http://", "http://me:secret@"))  # it answers
    with pytest.raises(UserError) as error:
        refuse_silent(silent.replace("http://", "http://me:secret@"), seconds=0.2)
    assert "secret" not in str(error.value)


def test_other_stores_are_not_asked() -> None:
    refuse_silent("sqlite:////nowhere/mlflow.db")
    refuse_silent("databricks")
