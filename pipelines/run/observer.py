"""Who is told what a run does while it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Observer(Protocol):
    """What a run tells about itself while it goes."""

    def started(self, stage: str, number: int, total: int, reason: str = "") -> None:
        """A stage begins; `reason`: why it is repeated."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far the stage is."""

    def finished(self, stage: str, seconds: float, *, found: bool, note: str = "") -> None:
        """A stage is done, or was found done (`found`)."""


class Quiet:
    """An observer that says nothing."""

    def started(self, stage: str, number: int, total: int, reason: str = "") -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Nothing."""

    def finished(self, stage: str, seconds: float, *, found: bool, note: str = "") -> None:
        """Nothing."""


def backbone_training(observer: Observer) -> Callable[[int, int], None]:
    """Shows how a backbone is trained, where it has to be: that comes before the first stage."""
    began = time.perf_counter()

    def show(done: int, total: int) -> None:
        if done == 0:
            observer.started("backbone", 1, 1)
        elif done < total:
            observer.progress(done, total, "steps of training")
        else:
            observer.finished("backbone", time.perf_counter() - began, found=False)

    return show
