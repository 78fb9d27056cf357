"""What a person sees while a stage runs: one living line, or a line at times in a log."""

import pytest

from jobs import console
from jobs.console import Console

Counts = list[tuple[int, int, str]]


def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, live: bool
) -> list[str]:
    """The lines of a stage of 5,000 images, found at 1,000, with a report each ten seconds."""
    clock = iter([0, 2, 10, 20, 30])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    screen = Console(live=live)
    screen.started("embed", 1, 1)
    for done, bad in ((1000, 0), (1400, 0), (2000, 1), (5000, 1)):
        screen.progress(done, 5000, f"images, {bad} rejected")
    screen.finished("embed", 28.0, found=False)
    return capsys.readouterr().out.replace("\r", "\n").splitlines()


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(monkeypatch, capsys, live=False) == [
        "embed     ...",
        "embed     2,000/5,000 images, 1 rejected, 56 images/s, 54 s left",
        "embed     done in 28.0 s",
    ]


def test_a_terminal_shows_every_step_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(monkeypatch, capsys, live=True)
    assert [line.rstrip() for line in lines] == [
        "",
        "embed     ...",
        "embed     1,000/5,000 images, 0 rejected",
        "embed     1,400/5,000 images, 0 rejected, 50 images/s, 1 min 12 s left",
        "embed     2,000/5,000 images, 1 rejected, 56 images/s, 54 s left",
        "embed     5,000/5,000 images, 1 rejected, 143 images/s",
        "embed     done in 28.0 s",
    ]
    assert len({len(line) for line in lines[1:]}) == 1  # each covers what stood there before


def test_slow_work_and_work_without_a_unit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0, 0, 100, 200])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    screen = Console(live=False)
    screen.started("embed", 2, 6)
    screen.progress(0, 90, "shards")
    screen.progress(1, 90, "shards")
    screen.progress(2, 90)
    assert capsys.readouterr().out.splitlines() == [
        "[2/6] embed     ...",
        "[2/6] embed     1/90 shards, 0.0 shards/s, 2 h 28 min left",
        "[2/6] embed     2/90, 2 h 26 min left",
    ]
