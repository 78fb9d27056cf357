"""Measuring one call against another in the same process, and printing what came out.

Seconds of one machine mean little, and a busy machine makes them worse: the two calls are timed
in turns, the best of each is kept, and the ratio is what a limit is set on.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipelines.config import UserError

Call = Callable[[], object]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` is ours over the reference, and holds if it is at most `limit`.

    Rows on memory have no seconds: there `ratio` is of bytes, and `note` names them.
    """

    name: str
    seconds: float | None
    reference: str
    reference_seconds: float | None
    ratio: float | None
    limit: float | None
    note: str

    @property
    def holds(self) -> bool | None:
        """Whether the limit is kept; None where there is no limit or nothing was measured."""
        if self.ratio is None or self.limit is None:
            return None
        return self.ratio <= self.limit


def named(names: Iterable[str], only: str, what: str) -> list[str]:
    """Those of `names` that hold `only`, in capitals or not.

    Raises:
        UserError: none does; `what` says what they are.
    """
    known = list(names)
    chosen = [name for name in known if only.lower() in name.lower()]
    if not chosen:
        raise UserError(f"only={only}: no such {what}; allowed: {', '.join(known)}")
    return chosen


def compare(
    name: str,
    call: Call,
    *,
    reference: str,
    reference_call: Call,
    limit: float | None = None,
    repeats: int = 3,
) -> Row:
    """Time `call` and `reference_call` in turns, `repeats` times each, and keep the best of each.

    Args:
        name: What is measured, with its sizes.
        call: The call, without arguments.
        reference: Name of what it is measured against.
        reference_call: That call.
        limit: Largest ratio that is accepted, if any.
        repeats: Turns, at least 1.
    """
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds_of(call))
        theirs.append(seconds_of(reference_call))
    seconds, reference_seconds = min(ours), min(theirs)
    note = f"best of {repeats}"
    return Row(
        name, seconds, reference, reference_seconds, seconds / reference_seconds, limit, note
    )


def seconds_of(call: Call) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare_memory(
    name: str, call: Call, *, reference: str, reference_bytes: int, limit: float | None = None
) -> Row:
    """Extra memory at the peak of `call`, over `reference_bytes`."""
    extra = extra_memory(call)
    if extra is None:
        return Row(name, None, reference, None, None, limit, "not measured: needs Linux's /proc")
    note = f"{extra / 2**20:.0f} MiB beside {reference_bytes / 2**20:.0f} MiB"
    return Row(name, None, reference, None, extra / reference_bytes, limit, note)


def extra_memory(call: Call) -> int | None:
    """Bytes by which the resident memory of this process grows at the peak of a call.

    Returns None where the system does not tell: it takes Linux's /proc and glibc.
    """
    call()  # what a first call keeps for good (libraries, thread pools) is not the call's own
    gc.collect()
    try:
        # What the allocator has kept for re-use would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def with_note(row: Row, note: str) -> Row:
    """The row with a note added."""
    return dataclasses.replace(row, note=f"{row.note}; {note}" if row.note else note)


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table that also reads well in a terminal."""
    head = ["measured", "s", "reference", "s", "ratio", "limit", "holds", "note"]
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    printed = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([printed[0], rule, *printed[1:]])


def to_json(rows: Iterable[Row]) -> str:
    """Rows as a JSON list, one object each, with `holds`."""
    return json.dumps([dataclasses.asdict(row) | {"holds": row.holds} for row in rows], indent=2)


def _cells(row: Row) -> list[str]:
    numbers = (row.seconds, row.reference_seconds, row.ratio, row.limit)
    seconds, reference_seconds, ratio, limit = (
        "" if number is None else f"{number:.3g}" for number in numbers
    )
    holds = {None: "", True: "yes", False: "NO"}[row.holds]
    return [row.name, seconds, row.reference, reference_seconds, ratio, limit, holds, row.note]


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


class PeakMemory:
    """The largest sum of proportional set sizes of this process and its children, sampled."""

    def __init__(self, *, files: bool = True) -> None:
        """`largest` in bytes is known after the block; `files`: count mapped files too."""
        self.largest, self._files = 0, files
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            pids = [os.getpid(), *_workers()]
            self.largest = max(self.largest, sum(_private(pid, self._files) for pid in pids))


def _workers() -> list[int]:
    """Ray's workers below this process: each names what it runs in its title, `ray::...`."""
    parents: dict[int, int] = {}
    titles: dict[int, bytes] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            # The name in brackets may hold spaces; the parent is the second word after it.
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[pid] = (folder / "cmdline").read_bytes()

    def is_mine(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, title in titles.items() if title.startswith(b"ray::") and is_mine(pid)]


def _private(pid: int, files: bool) -> int:
    """Bytes of anonymous and perhaps of file pages, in proportion; not the object store's."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    of_files = int(sizes.get("Pss_File", 0)) if files else 0
    return 1024 * (int(sizes.get("Pss_Anon", 0)) + of_files)
