"""Which Ray cluster a job uses and how much of it each stage may take."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from pipelines.config import Section

logger = logging.getLogger(__name__)
# Ray's own word for a node of one machine; its default elsewhere than on Linux.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class ComputeConfig(Section):
    """Workers and their resources; the same words on a laptop and on a cluster."""

    address: str = Field(
        "local", description="local: start Ray here; auto or HOST:PORT: join a running cluster"
    )
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of a local Ray; default: at least 4"
    )
    embed_workers: int = Field(1, ge=1, description="encoding actors of embed")
    embed_threads: int = Field(1, ge=1, description="CPU threads of an encoding actor")
    embed_gpus: float = Field(0, ge=0, description="GPUs of an encoding actor, may be a fraction")
    train_workers: int = Field(1, ge=1, description="Ray Train workers of finetune")
    train_gpus: float = Field(0, ge=0, description="GPUs of a Ray Train worker")
    trial_cpus: float = Field(1, gt=0, description="CPUs of a sweep trial")
    trial_gpus: float = Field(0, ge=0, description="GPUs of a sweep trial")
    max_failures: int = Field(2, ge=0, description="restarts of a failed Ray Train run")

    @property
    def embed_device(self) -> str:
        """Where encoding actors run the tower: "cpu" or "cuda"."""
        return "cuda" if self.embed_gpus else "cpu"

    @property
    def at_once(self) -> int | None:
        """Busy processes that make sense at a time; None: as many as the cluster has CPUs for.

        A local Ray's CPUs are logical: more processes than cores would only take turns, and each
        takes seconds to start.
        """
        return (os.cpu_count() or 1) if self.address == "local" else None


@contextmanager
def connect(config: ComputeConfig) -> Iterator[None]:
    """A Ray driver for the time of the block.

    Inside a submitted job (or a shell with RAY_ADDRESS) Ray's own address wins. A Ray that is
    already initialised is used and left running.
    """
    # Said before Ray is imported, which reads it: a local Ray listens on the loopback alone.
    # Otherwise its ports, those of metrics too, are open on every interface, without a password.
    inherited = os.environ.get("RAY_ADDRESS")
    local = not inherited and config.address == "local"
    if local:
        os.environ.setdefault(LOOPBACK, "0")
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own table on every run
    # Ray Data's actor pools log a harmless error line of the core at every start.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray lets its workers give way to all else (niceness 15). Of two that wait for each other at
    # every step, each such moment costs both: 4 percent of `jobs.benchmark suite=train`.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ctrl-C ends a sweep as it ends every other stage; Tune would go on with what it has.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    options: dict[str, Any] = {"address": inherited or config.address}
    if local:
        # Logical CPUs: nested Train, Tune and Data need a few slots even on two cores.
        options["num_cpus"] = config.num_cpus or max(4, os.cpu_count() or 1)
        options["include_dashboard"] = False
        _on_loopback()
    with _own_signals():
        _start(local, options)
    try:
        yield
    finally:
        ray.shutdown()


def _on_loopback() -> None:
    """The same where something imported Ray before its variable was set."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(LOOPBACK) == "1"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Who handles SIGTERM and SIGINT stays as it was.

    Ray handles SIGTERM itself and prints the stack of its core, and neither lets a driver say how
    to go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what Ray's core writes to the terminal as it starts; errors are exceptions anyway."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a file descriptor is needed
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _start(local: bool, options: dict[str, Any]) -> None:
    """`ray.init`, tried twice here: Ray gives its own processes 30 s, a busy machine may not."""
    import ray

    for last in (not local, True):
        try:
            with warnings.catch_warnings(), _quiet_stderr():
                warnings.simplefilter("ignore")
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        except Exception as error:
            if last or "timed out during startup" not in str(error):
                raise
            logger.warning("Ray did not start within 30 s; once more")
        else:
            return
