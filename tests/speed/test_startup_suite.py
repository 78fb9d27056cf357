"""The parts of suite=startup that need no run; the whole of it is a command of minutes."""

from __future__ import annotations

import pytest

from pipelines import speed
from pipelines.config import UserError
from pipelines.speed import startup


def test_an_unknown_part_is_refused_with_the_parts_there_are() -> None:
    with pytest.raises(UserError, match="only=hlep: no such part; allowed: help, wrong_word"):
        speed.run("startup", only="hlep")


def test_a_wait_is_the_median_of_its_runs_beside_the_yardstick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = iter([1.0, 4.0, 2.0, 9.0, 1.0, 6.0])
    asked = []

    def seconds_of(arguments: tuple[str, ...], status: int) -> float:
        asked.append((arguments[-1], status))
        return next(waits)

    monkeypatch.setattr(startup, "seconds_of", seconds_of)
    (row,) = startup.run(scale=0.6, only="wrong_word")
    assert asked == [("import torch", 0), ("no_such_key=1", 2)] * 3
    assert (row.seconds, row.reference_seconds, row.ratio) == (6.0, 1.0, 6.0)
    assert row.note == "median of 3; 1.5 s promised: NOT kept"


def test_a_command_that_ends_otherwise_than_it_should_is_no_measurement() -> None:
    assert startup.seconds_of(["-c", "raise SystemExit(2)"], 2) > 0
    with pytest.raises(UserError, match="exit status 1: ValueError: gone"):
        startup.seconds_of(["-c", "raise ValueError('gone')"], 0)
