"""A process that can be recognised later, also from another machine or after a restart."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.records import StoredRecord

# Before the owner in the name of a temporary folder outside of any storage.
PREFIX = "energy-ood-"


class Process(StoredRecord):
    """One process: enough of it to say, later, whether it has ended.

    Attributes:
        host: the machine's name.
        machine: its identity, the same after a restart; empty where it has none.
        boot: identity of its start.
        namespace: in which `pid` means something; containers have their own.
        pid: the process.
        started: when, in the kernel's ticks; a number is given to another process one day.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    started: str

    @property
    def is_gone(self) -> bool:
        """Whether it has surely ended; a process of another machine never counts as gone."""
        here = this_process()
        if (self.host, self.machine) != (here.host, here.machine):
            return False
        if self.boot != here.boot:  # the machine was started again
            return bool(self.machine)
        return self.namespace == here.namespace and _started(self.pid) != self.started


@functools.lru_cache(maxsize=1)
def _of(pid: int) -> Process:
    return Process(
        host=socket.gethostname(),
        machine=_text("/etc/machine-id"),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        pid=pid,
        started=_started(pid),
    )


def this_process() -> Process:
    """The process that asks."""
    return _of(os.getpid())


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the time of the block, and for what libraries create on their own meanwhile.

    Its name says whose it is, so that `remove_temporary_folders` finds it once that was killed.
    """
    here = this_process()
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{here.pid}-{here.started}-") as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def remove_temporary_folders() -> None:
    """Remove the temporary folders of processes of this machine that are gone."""
    here = this_process()
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*-*"):
        pid, started, _ = folder.name.removeprefix(PREFIX).split("-", 2)
        if not (pid.isdecimal() and started.isdecimal()):
            continue
        owner = here.model_copy(update={"pid": int(pid), "started": started})
        if owner.is_gone:
            shutil.rmtree(folder, ignore_errors=True)


def _started(pid: int) -> str:
    """When a process started; empty where it has ended, a number otherwise."""
    try:
        # "pid (name) state parent ...": the name may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "" if Path("/proc/self").exists() or not _answers(pid) else "0"
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _answers(pid: int) -> bool:
    """Whether there is such a process, where the system has no /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
