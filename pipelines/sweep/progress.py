"""How far a sweep is, and how much of its time is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

# (trials done, in all, a note)
Progress: TypeAlias = Callable[[int, int, str], None]


@dataclass
class Live:
    """What the terminal is told: trials done, running and failed, the best so far."""

    total: int
    report: Progress | None
    done: int = 0
    failed: int = 0
    running: int = 0
    best: tuple[float, str] | None = None

    def add(self, method: str, auroc: float | None) -> None:
        """Count one finished trial more; one that failed has no AUROC."""
        self.done += 1
        if auroc is None:
            self.failed += 1
        elif self.best is None or auroc > self.best[0]:
            self.best = (auroc, method)
        self.show()

    def show(self) -> None:
        """Tell the observer."""
        if self.report is None:
            return
        notes = ["trials"]
        if self.running:
            notes.append(f"{self.running} running")
        if self.failed:
            notes.append(f"{self.failed} failed")
        if self.best is not None:
            notes.append(f"best AUROC {self.best[0]:.3f} ({self.best[1]})")
        self.report(self.done, self.total, ", ".join(notes))


@dataclass
class Budget:
    """The wall-clock time that a sweep may take."""

    seconds: float | None
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float | None:
        """Seconds left, at least one; None: no limit."""
        if self.seconds is None:
            return None
        return max(1.0, self.seconds - (time.monotonic() - self.began))

    @property
    def is_spent(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and time.monotonic() - self.began >= self.seconds
