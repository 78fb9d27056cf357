"""What a person waits for before a command answers, as whole processes.

Four commands, each started anew: `--help`, a wrong word, a run whose stages are all found, and
one image judged by the registered model. The last two need a run: `preset=test`, in a temporary
folder, comes first (about a minute). Beside each stands `python -c "import torch"`, measured in
turns with it, since the seconds of one machine mean little.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.config import CONF, UserError
from pipelines.data.digits import DigitsSource
from pipelines.speed.measure import Row

RUNS = 5
YARDSTICK = ("-c", "import torch")
# Seconds that are promised on two quiet cores, and the exit status.
PARTS = {
    "help": (1.5, 0),
    "wrong_word": (1.5, 2),
    "found_run": (5.0, 0),
    "one_image": (5.0, 0),
}
NAMES = {
    "help": "jobs.pipeline --help",
    "wrong_word": "jobs.pipeline with a wrong word",
    "found_run": "jobs.pipeline, everything found",
    "one_image": "jobs.predict, one image",
}


def run(*, scale: float = 1.0, only: str = "") -> list[Row]:
    """The median wait for each command, beside the import of torch.

    Args:
        scale: share of the five runs of each, in (0, 1].
        only: a name of `PARTS`; empty: all of them.

    Raises:
        UserError: for an unknown part, or where a command ends otherwise than it should.
    """
    if only and only not in PARTS:
        raise UserError(f"only={only}: no such part; allowed: {', '.join(PARTS)}")
    runs = max(1, round(RUNS * scale))
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        if only in ("", "found_run", "one_image"):
            seconds_of(commands["found_run"], 0)  # the run that is found from then on
        return [_row(part, commands[part], runs) for part in PARTS if only in ("", part)]


def _commands(folder: Path) -> dict[str, tuple[str, ...]]:
    """What follows `python`, by part; everything is kept in `folder`."""
    image = folder / "image.png"
    (content,) = DigitsSource().read(["digits/0003/plain"])
    image.write_bytes(content if isinstance(content, bytes) else b"")
    storage = f"storage={folder / 'outputs'}"
    return {
        "help": ("-m", "jobs.pipeline", "--help"),
        "wrong_word": ("-m", "jobs.pipeline", "no_such_key=1"),
        "found_run": ("-m", "jobs.pipeline", "preset=test", "training=in_process", storage),
        "one_image": ("-m", "jobs.predict", f"source={image}", storage),
    }


def _row(part: str, command: Sequence[str], runs: int) -> Row:
    promised, status = PARTS[part]
    ours, theirs = [], []
    for _ in range(runs):
        theirs.append(seconds_of(YARDSTICK, 0))
        ours.append(seconds_of(command, status))
    wait, reference = statistics.median(ours), statistics.median(theirs)
    kept = "kept" if wait <= promised else "NOT kept"
    note = f"median of {runs}; {promised:g} s promised: {kept}"
    return Row(
        NAMES[part], wait, "python -c 'import torch'", reference, wait / reference, None, note
    )


def seconds_of(arguments: Sequence[str], status: int) -> float:
    """Wall-clock seconds of one Python process from start to end.

    Args:
        arguments: what follows `python`.
        status: the exit status that it should have.

    Raises:
        UserError: with the process's last line, where it has another.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=CONF.parent, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode != status:
        last = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"python {' '.join(arguments)}: exit status {done.returncode}: {last}")
    return seconds
