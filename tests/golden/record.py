"""Record numbers: python -m tests.golden.record [NAME ...] [--into FOLDER] [--run FOLDER]

NAME is `one_epoch` (seconds) or a run of the pipeline (`demo`, `results_all`, ...; minutes, and
PACS needs the reference data). Without a NAME: `one_epoch`. Files go to tests/golden, or
elsewhere with --into. --run reads a run that is finished instead of running anything:

    python -m tests.golden.record demo --run outputs/runs/0123456789ab
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.golden import figures, one_epoch
from tests.golden.recording import FOLDER, Recording


def record(name: str, storage: Path | None = None) -> Recording:
    """The recording of that name; a run's files go to `storage`, or away."""
    if name == one_epoch.NAME:
        return one_epoch.record()
    if storage is not None:
        return figures.record(name, storage)
    with tempfile.TemporaryDirectory() as folder:
        return figures.record(name, Path(folder))


def main() -> None:
    names = (one_epoch.NAME, *figures.RUNS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--into", type=Path, default=FOLDER, help="folder of the JSON files")
    parser.add_argument("--run", type=Path, help="a finished run's folder, for one NAME")
    parser.add_argument("--storage", type=Path, help="storage of the runs; default: a new one")
    given = parser.parse_args()
    wanted = given.names or [one_epoch.NAME]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        parser.error(f"no recording {', '.join(unknown)}; there are {', '.join(names)}")
    if given.run and (len(wanted) != 1 or wanted[0] not in figures.RUNS):
        parser.error("--run belongs to one NAME of a pipeline's run")
    given.into.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        found = figures.read(name, given.run) if given.run else record(name, given.storage)
        print(found.write(given.into))


if __name__ == "__main__":
    main()
