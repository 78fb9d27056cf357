"""How a job ends when somebody stops it: SIGTERM, or Ctrl-C (SIGINT)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

LINE = "stopped; the same command goes on from here"


class Terminated(KeyboardInterrupt):
    """SIGTERM came; whoever cleans up after Ctrl-C does so after this too."""


@dataclass
class Stop:
    """Which signal asked a job to end.

    Attributes:
        number: the signal, or None. It is noted, since a library may turn the exception that
            follows into one of its own.
    """

    number: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Raise where the job is; end at once where it is asked a second time."""
        if self.number is not None:
            sys.stderr.flush()
            os.write(2, f"{LINE}\n".encode())
            os._exit(128 + number)
        self.number = number
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Note a signal that comes during the block, which ends by KeyboardInterrupt then."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
