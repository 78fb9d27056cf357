"""A barrier that holds a process inside its work, so that a test kills it there and nowhere else.

`HeldStorage` is a storage whose first write of a given file stops just before the file takes its
name. The process that writes says that it has arrived and waits; the test kills it, or lets it
go on. No test of a fault sleeps and hopes.

    barrier = Barrier.new(folder, held="cache/trials/*.json", after="cache/trials/*.json")
    work(barrier.storage(root))        # in another process or thread
    os.kill(barrier.arrived(), SIGKILL)
    barrier.open()
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import ray
from ray import cloudpickle

from pipelines.data.storage import Storage
from tests.patience import PATIENCE

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers may not import tests
# Nobody is held longer, in case that the test is gone.
LONGEST = PATIENCE


@dataclass(frozen=True)
class Barrier:
    """Where processes are held.

    Attributes:
        folder: holds the files `closed` and `arrived`.
        held: pattern of a file below the storage's root; the first writer of one is held.
        after: pattern of files, one of which must be there first; none: at once.
        more: how many more of them than one.
        node: the Ray node whose processes are held; none: all.
    """

    folder: str
    held: str
    after: str = ""
    more: int = 0
    node: str = ""

    @classmethod
    def new(
        cls, folder: Path, *, held: str, after: str = "", more: int = 0, node: str = ""
    ) -> Barrier:
        """A closed barrier."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "closed").touch()
        return cls(str(folder), held, after, more, node)

    def storage(self, root: str) -> HeldStorage:
        """A storage whose writers are held here."""
        return HeldStorage(Storage.open(root).root, self)

    @property
    def is_closed(self) -> bool:
        return (Path(self.folder) / "closed").exists()

    def open(self) -> None:
        """Let everybody go on, from now on."""
        (Path(self.folder) / "closed").unlink(missing_ok=True)

    def arrived(self, still: Callable[[], bool] = lambda: True, seconds: float = PATIENCE) -> int:
        """Wait until a process is held; its id. `still` says whether one may yet come."""
        place = Path(self.folder) / "arrived"
        wait_until(lambda: place.exists() or not still(), seconds)
        assert place.exists(), "everything ended before anything came to the barrier"
        wait_until(lambda: place.read_text().endswith("\n"), seconds)
        return int(place.read_text())

    def hold(self, root: str, name: str) -> None:
        """Stay here, where `name` is the file to be held and nobody is held yet."""
        if not self.is_closed or not fnmatch(name, self.held):
            return
        if self.after and len(list(Path(root).glob(self.after))) <= self.more:
            return
        if self.node and ray.get_runtime_context().get_node_id() != self.node:
            return
        try:
            with (Path(self.folder) / "arrived").open("x") as file:
                file.write(f"{os.getpid()}\n")
        except FileExistsError:
            return
        limit = time.monotonic() + LONGEST
        while self.is_closed and time.monotonic() < limit:
            time.sleep(0.02)


@dataclass(frozen=True)
class HeldStorage(Storage):
    """A local storage whose writers come to a barrier."""

    barrier: Barrier | None = None

    @contextmanager
    def writing(self, *parts: str, replace: bool = True) -> Iterator[Path]:
        with super().writing(*parts, replace=replace) as path:
            yield path
            if self.barrier is not None:
                self.barrier.hold(self.root, "/".join(parts))


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Ask again and again; a test that waits in vain says so."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "what was waited for never came"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"
