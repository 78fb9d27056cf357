"""What a person sees while a stage runs: a bar, or a line at times in a log."""

from typing import Any

import pytest
from rich.panel import Panel
from rich.progress import Progress, TaskID

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


def test_a_terminal_shows_a_bar_that_goes_when_the_stage_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, float, float | None]] = []
    update = Progress.update

    def watched(self: Progress, task: TaskID, **values: Any) -> None:
        update(self, task, **values)
        told.append((values["told"], self.tasks[0].completed, self.tasks[0].total))

    monkeypatch.setattr(Progress, "update", watched)
    lines = shown(monkeypatch, capsys, live=True)
    assert told == [
        ("1,000/5,000 images, 0 rejected", 1000, 5000),
        ("1,400/5,000 images, 0 rejected, 50 images/s, 1 min 12 s left", 1400, 5000),
        ("2,000/5,000 images, 1 rejected, 56 images/s, 54 s left", 2000, 5000),
        ("5,000/5,000 images, 1 rejected, 143 images/s", 5000, 5000),
    ]
    assert lines[-1] == "embed     done in 28.0 s"


def test_a_bar_is_gone_before_an_error_is_told() -> None:
    screen = Console(live=True)

    def fail() -> None:
        screen.started("embed", 2, 6)
        assert screen.bar is not None
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), screen:
        fail()
    assert screen.bar is None


def test_a_stage_that_counts_one_thing_and_then_another_has_a_pace_for_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0, 0, 100, 100, 200])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    screen = Console(live=False)
    screen.started("sweep", 2, 6)
    screen.progress(0, 10, "fits")
    screen.progress(10, 10, "fits")
    screen.progress(0, 8, "trials")
    screen.progress(2, 8, "trials")
    assert capsys.readouterr().out.splitlines() == [
        "[2/6] sweep     ...",
        "[2/6] sweep     10/10 fits, 0.1 fits/s",
        "[2/6] sweep     2/8 trials, 5 min 00 s left",
    ]


def test_what_rich_draws_is_plain_text_of_100_columns_in_a_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.show(Panel("[bold red]champion[/] " + 40 * "word "))
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines} == {100}
    assert "champion word" in lines[1]
    assert "\x1b" not in "".join(lines)


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
        "[2/6] embed     1/90 shards, 2 h 28 min left",
        "[2/6] embed     2/90, 2 h 26 min left",
    ]
