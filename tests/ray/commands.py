"""Commands as a user gives them, each with Ray files of its own, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ray.processes import descendants, kill

ROOT = Path(__file__).parents[2]


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's own files; its path is short, because Ray puts sockets into it."""
    folder = Path(tempfile.mkdtemp(prefix="eo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This environment with this Python first, one thread a process, and `folder` for Ray."""
    left_out = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    return {
        **{key: value for key, value in os.environ.items() if key not in left_out},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


def job(name: str, *words: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """`python -m jobs.NAME words...` at the repository's root, to its end."""
    with ray_folder() as folder:
        process = start(name, *words, folder=folder)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(name: str, *words: str, folder: Path) -> subprocess.Popen[str]:
    """`python -m jobs.NAME words...` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"jobs.{name}", *words],
        cwd=ROOT,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process and all below it, and wait until it is gone."""
    below = descendants(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    for pid in below:
        kill(pid)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def job_killed_when(
    reached: Callable[[], bool], name: str, *words: str, timeout: int = 300
) -> None:
    """Start a job and kill it, and all it started, as soon as `reached`, in the middle of it."""
    with ray_folder() as folder:
        process = start(name, *words, folder=folder)
        try:
            limit = time.monotonic() + timeout
            while not reached():
                assert process.poll() is None, "ended before it could be killed"
                assert time.monotonic() < limit, "never came to where it is killed"
                time.sleep(0.01)
        finally:
            end(process)
