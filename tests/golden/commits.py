"""Compare two commits: python -m tests.golden.commits REV1 REV2 [NAME ...]

Each commit is checked out into a folder of its own (`git worktree`), where its own recorder runs
with this Python; then the recordings are compared, to the last recorded digit unless
--tolerance says otherwise. NAME as in `tests.golden.record`; without one: `one_epoch`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.golden import one_epoch
from tests.golden.compare import TOLERANCES, report
from tests.golden.recording import FOLDER, Recording

ROOT = FOLDER.parents[1]


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, until the end of the block."""
    git = ("git", "-C", str(ROOT), "worktree")
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def record(revision: str, names: list[str], folder: Path) -> list[Recording]:
    """What a commit's own recorder records."""
    into = folder / "recorded"
    with checked_out(revision, folder / "tree") as tree:
        subprocess.run(
            [sys.executable, "-m", "tests.golden.record", *names, "--into", str(into)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdout=sys.stderr,
            check=True,
        )
    return [Recording.read(into / f"{name}.json") for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs=2, metavar="REV")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--tolerance", choices=TOLERANCES, default="exact")
    given = parser.parse_args()
    names = given.names or [one_epoch.NAME]
    with tempfile.TemporaryDirectory() as folder:
        both = [
            record(revision, names, Path(folder) / str(number))
            for number, revision in enumerate(given.revisions)
        ]
    near = TOLERANCES[given.tolerance]
    moved = [report(a, b, near) for a, b in zip(*both, strict=True)]
    sys.exit(any(moved))


if __name__ == "__main__":
    main()
