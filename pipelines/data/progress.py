"""Progress that a person can read: a line that moves on a terminal, now and then one elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

QUIET_SECONDS = 30.0  # between two lines where nobody watches a terminal


@dataclass
class ProgressLine:
    """Images done / total, images/s, time left and rejected so far; call it as it goes.

    The rate is of the images done since the first call, so that neither what was found done nor
    the start-up counts as speed.

    Attributes:
        stream: where the lines go.
        clock: seconds, for tests.
    """

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    _first: tuple[float, int] | None = field(default=None, init=False)
    _shown: float = field(default=float("-inf"), init=False)

    def __call__(self, done: int, total: int, rejected: int) -> None:
        """Show where things stand."""
        now = self.clock()
        if self._first is None:
            self._first = (now, done)
        terminal = self.stream.isatty()
        due = now - self._shown >= (0 if terminal else QUIET_SECONDS)
        if not due and done < total:
            return
        self._shown = now
        line = self.text(done, total, rejected, now)
        self.stream.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
        if terminal and done >= total:
            self.stream.write("\n")
        self.stream.flush()

    def text(self, done: int, total: int, rejected: int, now: float) -> str:
        """The line itself."""
        start, before = self._first or (now, done)
        parts = [f"{done:,} / {total:,} images"]
        if now > start and done > before:
            rate = (done - before) / (now - start)
            parts.append(f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.1f} images/s")
            if done < total:
                parts.append(f"{_duration((total - done) / rate)} left")
        if rejected:
            parts.append(f"{rejected:,} rejected")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
