import io

from pipelines.data.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, times: list[float], counts: list[tuple[int, int, int]]) -> str:
    clock = iter(times)
    line = ProgressLine(stream, clock=lambda: next(clock))
    for count in counts:
        line(*count)
    return stream.getvalue()


def test_one_line_now_and_then_where_nobody_watches() -> None:
    counts = [(1000, 5000, 0), (2000, 5000, 1), (3000, 5000, 1), (5000, 5000, 2)]
    assert run(io.StringIO(), [0, 10, 40, 50], counts).splitlines() == [
        "1,000 / 5,000 images",
        "3,000 / 5,000 images, 50 images/s, 40 s left, 1 rejected",
        "5,000 / 5,000 images, 80 images/s, 2 rejected",
    ]


def test_a_terminal_shows_every_step_on_one_line() -> None:
    text = run(Terminal(), [0, 100, 200], [(0, 90, 0), (1, 90, 0), (90, 90, 0)])
    assert text.split("\r\x1b[K") == [
        "",
        "0 / 90 images",
        "1 / 90 images, 0.0 images/s, 2 h 28 min left",
        "90 / 90 images, 0.5 images/s\n",
    ]
