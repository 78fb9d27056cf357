"""What a run looks like in a terminal, and in a log file."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field

LOG_EVERY_S = 15.0


@dataclass
class Console:
    """Prints stages, progress and times: one living line on a terminal, else a line at times."""

    live: bool = field(default_factory=lambda: sys.stdout.isatty())
    began: float = 0.0
    printed: float = 0.0
    first: tuple[float, int] | None = None
    title: str = ""

    def started(self, stage: str, number: int, total: int, reason: str = "") -> None:
        """A stage begins; `reason`: why it is repeated."""
        self.began = self.printed = time.monotonic()
        self.first = None
        self.title = f"[{number}/{total}] {stage:<9}" if total > 1 else f"{stage:<9}"
        self._show(f"again: {reason}" if reason else "...", last=bool(reason))

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far the stage is, how fast, and the time that is left if it goes on like this.

        Args:
            done: units done.
            total: units in all.
            note: what a unit is, in the plural, and whatever else after a comma.
        """
        now = time.monotonic()
        self.first = self.first or (now, done)
        if not self.live and now - self.printed < LOG_EVERY_S:
            return
        self.printed = now
        parts = [f"{done:,}/{total:,} {note}".rstrip(), *self._pace(done, total, note, now)]
        self._show(", ".join(parts))

    def _pace(self, done: int, total: int, note: str, now: float) -> list[str]:
        # Since the first report: neither start-up nor what was found done says how fast it goes.
        begin, before = self.first or (now, done)
        if now <= begin or done <= before:
            return []
        rate = (done - before) / (now - begin)
        unit = note.partition(",")[0]
        speed = [f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"] if unit else []
        return [*speed, f"{duration((total - done) / rate)} left"] if done < total else speed

    def finished(self, stage: str, seconds: float, *, found: bool, note: str = "") -> None:
        """A stage is done."""
        if found:
            print(f"{stage:<15} found, nothing to do")
            return
        self._show(f"done in {seconds:.1f} s{', ' + note if note else ''}", last=True)

    def _show(self, text: str, *, last: bool = False) -> None:
        line = f"{self.title} {text}"
        if not self.live:
            print(line, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}", end="\n" if last else "", flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 3 min 05 s, 2 h 28 min."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
