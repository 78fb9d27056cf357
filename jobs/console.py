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

    def started(self, stage: str, number: int, total: int) -> None:
        """A stage begins."""
        self.began = self.printed = time.monotonic()
        self.first = None
        self.title = f"[{number}/{total}] {stage:<9}" if total > 1 else f"{stage:<9}"
        self._show("...")

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far the stage is, with the time that is left if it goes on like this."""
        now = time.monotonic()
        self.first = self.first or (now, done)
        if not self.live and now - self.printed < LOG_EVERY_S:
            return
        self.printed = now
        # The pace since the first report: a stage's start-up says nothing about what is left.
        begin, before = self.first
        pace = (now - begin) / (done - before) if done > before else None
        left = f", {pace * (total - done):.0f} s left" if pace and done < total else ""
        self._show(f"{done}/{total} {note}, {now - self.began:.0f} s{left}")

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
