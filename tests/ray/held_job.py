"""A job whose files come to a barrier: python -m tests.ray.held_job BARRIER JOB words...

BARRIER is a `tests.barrier.Barrier` as JSON; every storage that the job opens is held there, in
the job's own process and in its workers.
"""

from __future__ import annotations

import json
import runpy
import sys

from pipelines.data.storage import Storage
from tests.barrier import Barrier, HeldStorage


def main() -> None:
    _, barrier, job, *words = sys.argv
    held = Barrier(**json.loads(barrier))
    opened = Storage.open
    Storage.open = lambda root: HeldStorage(opened(root).root, held)  # type: ignore[method-assign, assignment]
    sys.argv = [f"jobs.{job}", *words]
    runpy.run_module(f"jobs.{job}", run_name="__main__")


if __name__ == "__main__":
    main()
