"""What a run looks like in a terminal, and in a log file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

LOG_EVERY_S = 15.0
WIDTH = 100


@dataclass
class Console:
    """Shows stages, progress and times: a living bar on a terminal, else a line at times.

    It is a context: on an error the bar goes before the message comes.
    """

    live: bool = field(default_factory=lambda: sys.stdout.isatty())
    printed: float = 0.0
    first: tuple[float, int] | None = None
    total: int = 0
    title: str = ""
    bar: Progress | None = None

    def __enter__(self) -> Self:
        """Nothing is drawn yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """The bar goes, whatever happened."""
        self._stop()

    def started(self, stage: str, number: int, total: int, reason: str = "") -> None:
        """A stage begins; `reason`: why it is repeated."""
        self.printed = time.monotonic()
        self.first = None
        self.title = f"[{number}/{total}] {stage:<9}" if total > 1 else f"{stage:<9}"
        if reason:
            print(f"{self.title} again: {reason}", flush=True)
        if not self.live:
            print(f"{self.title} ...", flush=True)
            return
        self._stop()
        self.bar = _bar()
        self.bar.add_task(self.title, total=None, told="")
        self.bar.start()

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far the stage is, how fast, and the time that is left if it goes on like this.

        Args:
            done: units done.
            total: units in all.
            note: what a unit is, in the plural, and whatever else after a comma.
        """
        now = time.monotonic()
        if self.first is None or total != self.total or done < self.first[1]:
            self.first, self.total = (now, done), total  # a stage counts one thing, then another
        parts = [f"{done:,}/{total:,} {note}".rstrip(), *self._pace(done, total, note, now)]
        told = ", ".join(parts)
        if self.bar is not None:
            (task,) = self.bar.task_ids
            self.bar.update(task, completed=done, total=total, told=told)
        elif now - self.printed >= LOG_EVERY_S:
            self.printed = now
            print(f"{self.title} {told}", flush=True)

    def _pace(self, done: int, total: int, note: str, now: float) -> list[str]:
        # Since the first report: neither start-up nor what was found done says how fast it goes.
        begin, before = self.first or (now, done)
        if now <= begin or done <= before:
            return []
        rate = (done - before) / (now - begin)
        unit = note.partition(",")[0]
        speed = [f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"]
        speed = speed if unit and rate >= 0.1 else []
        return [*speed, f"{duration((total - done) / rate)} left"] if done < total else speed

    def finished(self, stage: str, seconds: float, *, found: bool, note: str = "") -> None:
        """A stage is done."""
        if found:
            print(f"{stage:<15} found, nothing to do")
            return
        self._stop()
        print(f"{self.title} done in {seconds:.1f} s{', ' + note if note else ''}", flush=True)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _bar() -> Progress:
    """A line that is drawn anew: title, bar, what is told, and the time since the stage began."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    told = TextColumn("{task.fields[told]}", markup=False, table_column=Column(ratio=1))
    title = TextColumn("{task.description}", markup=False)
    # Neither stream is taken over: Ray and its processes write to them on their own.
    return Progress(
        title,
        BarColumn(bar_width=16),
        told,
        TimeElapsedColumn(),
        transient=True,
        expand=True,
        redirect_stdout=False,
        redirect_stderr=False,
        refresh_per_second=4,
    )


def show(drawn: RenderableType) -> None:
    """Print what `rich` can draw: at most 100 columns, and plain text where it is no terminal.

    A line that may not be folded, such as a command, keeps its length.
    """
    from rich.console import Console as Terminal

    options: dict[str, Any] = {} if sys.stdout.isatty() else {"width": WIDTH, "color_system": None}
    terminal = Terminal(highlight=False, **options)
    terminal.print(drawn, width=min(WIDTH, terminal.width), crop=False)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 3 min 05 s, 2 h 28 min."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
