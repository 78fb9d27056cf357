"""Commands as a user gives them, each with Ray files of its own, and nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from tests.barrier import Barrier
from tests.patience import PATIENCE
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


def job(name: str, *words: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """`python -m jobs.NAME words...` at the repository's root, to its end."""
    with ray_folder() as folder:
        process = start(f"jobs.{name}", *words, folder=folder)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(module: str, *words: str, folder: Path) -> subprocess.Popen[str]:
    """`python -m MODULE words...` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
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
        process.wait(timeout=PATIENCE)
    for pid in below:
        kill(pid)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def job_killed_at(barrier: Barrier, name: str, *words: str) -> None:
    """Start a job and kill it, and all it started, once one of its processes is held."""
    held = json.dumps(asdict(barrier))
    with ray_folder() as folder:
        process = start("tests.ray.held_job", held, name, *words, folder=folder)
        try:
            barrier.arrived(lambda: process.poll() is None)
        finally:
            end(process)


def job_here(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The same as `job` in this process, on the Ray that is already there."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    notes = logging.StreamHandler(err)  # as `jobs.main` sets up in a process of its own
    notes.setLevel(logging.WARNING)
    logging.getLogger().addHandler(notes)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [f"jobs.{name}", *words]),
    ):
        sys.modules.pop(f"jobs.{name}", None)  # imported by another test: run it anew
        try:
            runpy.run_module(f"jobs.{name}", run_name="__main__")
        except SystemExit as end_of_job:
            status = int(end_of_job.code or 0)
        finally:
            logging.getLogger().removeHandler(notes)
    return subprocess.CompletedProcess([name, *words], status, out.getvalue(), err.getvalue())
