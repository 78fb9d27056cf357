"""Run every fault test again and again beside a busy CPU: python -m tests.faults [--times 20]

A fault test (marker `fault`) kills a worker, a node or a driver in the middle of its work. It may
never depend on who is faster, so this runs all of them `--times` times while `--hogs` processes
do nothing but compute, and prints how often each failed. The exit status is 1 where any did.

    python -m tests.faults --times 3 tests/ray/test_embed_faults.py    # some of them only
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
HOG = "while True: pass"


@contextmanager
def busy(hogs: int) -> Iterator[None]:
    """Processes that take all the CPU they are given, for the time of the block."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", HOG]) for _ in range(hogs)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def once(tests: list[str], folder: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each fault test ran and failed in one run of pytest."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "fault", f"--junitxml={report}", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not report.exists():
        sys.exit(done.stdout + done.stderr)
    ran, failed = counts(ElementTree.parse(report).getroot())
    if failed:
        print(done.stdout, file=sys.stderr)
    return ran, failed


def counts(report: ElementTree.Element) -> tuple[Counter[str], Counter[str]]:
    """The tests that ran, and those that failed, in a report of pytest."""
    ran: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for case in report.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("skipped") is None:
            ran[name] += 1
            failed[name] += any(case.find(tag) is not None for tag in ("failure", "error"))
    return ran, +failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", default=["tests"], help="as pytest takes them")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--hogs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    ran: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, busy(given.hogs):
        for number in range(1, given.times + 1):
            more, bad = once(given.tests, Path(folder))
            ran, failed = ran + more, failed + bad
            print(f"round {number} of {given.times}: {sum(bad.values())} failed", flush=True)
    for name in sorted(ran):
        print(f"{failed[name]:3d} of {ran[name]} failed  {name}")
    print(f"{failed.total()} failures of {ran.total()}")
    sys.exit(bool(failed) or not ran)


if __name__ == "__main__":
    main()
