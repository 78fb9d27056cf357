"""Epoch reports on their way to MLflow while heads are trained: kept for a while, sent together.

One call of MLflow's store for each number would cost more than an epoch; so the reports of every
training wait here and go out in batches, one run a training, and what a killed driver had sent
already is not sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TypeAlias

from pipelines.store.tracker import ActiveRun

OpenRun: TypeAlias = Callable[[str], AbstractContextManager[ActiveRun]]
SEND_EVERY_S = 10.0


class EpochLog:
    """Collects epoch reports by the name of their training and sends them in batches."""

    def __init__(self, open_run: OpenRun, *, every_s: float = SEND_EVERY_S) -> None:
        """Send through `open_run(name)`, at most every so many seconds."""
        self.open_run = open_run
        self.every_s = every_s
        self.waiting: dict[str, dict[int, Mapping[str, float]]] = {}
        self.sent = time.monotonic()

    def add(self, name: str, report: Mapping[str, float]) -> None:
        """Keep one epoch's report; an epoch that comes again replaces the first."""
        figures = {key: value for key, value in report.items() if key != "epoch"}
        self.waiting.setdefault(name, {})[int(report["epoch"])] = figures
        if time.monotonic() - self.sent >= self.every_s:
            self.send()

    def finish(self, name: str, history: Iterable[Mapping[str, float]]) -> None:
        """Send a whole history, as far as the run does not have it yet."""
        for report in history:
            figures = {key: value for key, value in report.items() if key != "epoch"}
            self.waiting.setdefault(name, {})[int(report["epoch"])] = figures
        self.send()

    def send(self) -> None:
        """Send what waits."""
        waiting, self.waiting = self.waiting, {}
        for name, epochs in waiting.items():
            with self.open_run(name) as active:
                active.log_series(epochs)
        self.sent = time.monotonic()
