"""A real `ray start --head` with token authentication, and jobs submitted to it."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.data.storage import Storage
from tests.patience import PATIENCE
from tests.ray.commands import ROOT, end, environment, ray_folder
from tests.ray.processes import descendants, kill

RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    """A running head: where jobs are sent, and the environment that is allowed to."""

    address: str
    environment: dict[str, str]

    def submit(self, *words: str) -> subprocess.Popen[str]:
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", ".", "--"]
        return subprocess.Popen(
            [*command, "python", "-m", "jobs.pipeline", *words],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def answers(self, token: str) -> bool:
        request = urllib.request.Request(f"{self.address}/api/jobs/")
        request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_folder() as folder:
        token = secrets.token_hex(32)
        (folder / "token").write_text(token)
        (folder / "token").chmod(0o600)
        given = environment(
            folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token")
        )
        port, dashboard, *others = free_ports(7)
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port",
                 "runtime-env-agent-port", "metrics-export-port", "node-manager-port")  # fmt: skip
        options = [f"--{name}={each}" for name, each in zip(names, others, strict=True)]
        log = (folder / "head.log").open("w")
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={port}",
             f"--dashboard-port={dashboard}", "--min-worker-port=0", "--max-worker-port=0",
             f"--temp-dir={folder}", *options],
            cwd=folder,
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            found = Head(f"http://127.0.0.1:{dashboard}", given)
            wait_for(lambda: found.answers(token), process, folder / "head.log")
            yield found
        finally:
            # --block hands the signal on to what it started, and then waits long for some of it.
            below = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            end(process)
            log.close()
            for pid in filter(alive, below):
                kill(pid)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(ready, process: subprocess.Popen[str], log: Path) -> None:  # type: ignore[no-untyped-def]
    limit = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.3)


@pytest.mark.slow
def test_a_job_that_passes(head: Head, mini_storage: Storage, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    backbones = mini_storage.local("cache", "backbones")
    shutil.copytree(backbones, storage / "cache" / "backbones")
    # Ray Train's start-up, a quarter of the time, is in tests/ray/test_pipeline.py.
    words = ["preset=test", "methods=[zero_shot,coop]", "training=in_process",
             f"storage={storage}"]  # fmt: skip
    with head.submit(*words) as process:
        assert process.stdout is not None
        lines, running = [], False
        for line in process.stdout:
            lines.append(line)
            if "[1/6] embed" in line:
                running = process.poll() is None and not any(storage.glob("runs/*/register.json"))
        status = process.wait(timeout=PATIENCE)
    output = "".join(lines)
    assert status == 0, output
    assert running, "nothing was shown before the end"
    assert "[6/6] register  done in" in output
    assert "OOD ACC" in output
    assert "succeeded" in output
    (folder,) = (storage / "runs").iterdir()
    assert {p.name for p in folder.iterdir()} >= {"metrics.json", "report.html", "register.json"}
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"zero_shot", "coop"}
    assert (storage / "mlflow.db").exists()
    # The job's copy of this folder is thrown away: nothing may have been written there.
    assert str(storage) in output


@pytest.mark.slow
def test_a_job_that_fails_names_the_fix(head: Head) -> None:
    with head.submit("preset=test", "storage=outputs") as process:
        assert process.stdout is not None
        output = process.stdout.read()
        status = process.wait(timeout=PATIENCE)
    assert status == 1, output
    assert "error: storage='outputs': a submitted Ray job runs in a folder that is thrown" in output
    assert "give an absolute path or a URI" in output
    assert "failed" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_without_the_token_the_head_does_not_answer(head: Head) -> None:
    assert not head.answers("not the token")
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert head.answers(token)
