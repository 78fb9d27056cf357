"""The Makefile and .ci/run, with a stand-in for the tools that they call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.experiments import demo
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run in `cwd` with its stand-ins first on PATH (make looks there for uv)."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TERM", "MAKEFLAGS")}
    environment["PATH"] = f"{cwd}/bin:{cwd}/.venv/bin:{environment['PATH']}"
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that is set up already: the Makefile, and tools that note how they are called."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").touch()
    for tool in ("python", "ruff", "mypy", "lint-imports", "uv"):
        name = f'echo "{tool} $*" >> "{tmp_path}/calls"'
        status = f'test "{tool}" = python && exit $(cat "{tmp_path}/status") || exit 0'
        script(tmp_path / ".venv" / "bin" / tool, f"{name}\n{status}")
    (tmp_path / ".venv" / ".installed").touch()
    (tmp_path / "status").write_text("0")
    return tmp_path


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_make_test_runs_lint_types_layers_and_the_tests_without_set_up(checkout: Path) -> None:
    done = run("make", "test", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert calls(checkout) == [
        "ruff format --check .",
        "ruff check .",
        "mypy ",
        "lint-imports ",
        "python -m pytest -n 2 -m not slow --durations=15",
    ]


def test_make_demo_runs_the_main_job(checkout: Path) -> None:
    assert run("make", "demo", cwd=checkout).returncode == 0
    # The picture of README is drawn from the run of the same words.
    assert calls(checkout) == [" ".join(("python -m jobs.pipeline", *demo.WORDS))]


def test_a_newer_lock_file_is_installed_again(checkout: Path) -> None:
    installed = checkout / ".venv" / ".installed"
    os.utime(installed, (1, 1))
    assert run("make", "setup", cwd=checkout).returncode == 0
    assert [line.split()[:2] for line in calls(checkout)] == [["uv", "venv"], ["uv", "pip"]]
    assert "--require-hashes" in calls(checkout)[1]
    assert installed.stat().st_mtime > 1


# pytest ends with 1 where a test fails and with 5 where none was chosen.
@pytest.mark.parametrize(("status", "passes"), [("0", True), ("5", True), ("1", False)])
def test_make_test_slow_passes_where_no_test_is_slow(
    checkout: Path, status: str, passes: bool
) -> None:
    (checkout / "status").write_text(status)
    done = run("make", "test-slow", cwd=checkout)
    assert (done.returncode == 0) is passes


def test_make_test_fails_where_a_test_fails(checkout: Path) -> None:
    (checkout / "status").write_text("1")
    assert run("make", "test", cwd=checkout).returncode != 0


AUDIT = """
while [ "$1" != --output ]; do shift; done
"""
FOUND = """{"dependencies": [{"name": "sound", "version": "2", "vulns": []}, {"name": "weak",
 "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}]}"""


@pytest.mark.parametrize(
    ("uv", "status", "told"),
    [
        ("echo ConnectionError: no route >&2; exit 1", 0, "audit: skipped, no answer"),
        (f"{AUDIT} echo '{{}}' > $2", 0, "audit: no known weakness"),
        (f"{AUDIT} cat > $2 <<E\n{FOUND}\nE\nexit 1", 2, "weak 1.0: PYSEC-1, mended in 1.1"),
    ],
)
def test_make_audit_fails_on_what_it_finds_and_nowhere_else(
    checkout: Path, uv: str, status: int, told: str
) -> None:
    (checkout / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "audit", checkout / ".ci")
    script(checkout / "bin" / "uv", f'echo "uv $*" >> "{checkout}/calls"\n{uv}')
    done = run("make", "audit", cwd=checkout)
    assert done.returncode == status, done.stderr
    assert told in done.stdout
    assert "sound" not in done.stdout
    assert calls(checkout)[0].startswith("uv tool run --quiet pip-audit ")


@pytest.mark.parametrize("failing", ["", "audit", "test", "test-slow", "test test-slow"])
def test_ci_runs_every_part_and_fails_where_one_does(tmp_path: Path, failing: str) -> None:
    last = 'for name; do :; done\necho "made $name"'
    lines = '[ "$name" = test ] && echo "7.50s call     tests/room/test_a.py::test_x"\n'
    lines += '[ "$name" = test ] || echo "61.20s setup    tests/ray/test_b.py::test_y"'
    fails = f'case " {failing} " in *" $name "*) exit 2;; esac'
    script(tmp_path / "bin" / "make", f"{last}\n{lines}\n{fails}")
    done = run(str(ROOT / ".ci" / "run"), cwd=tmp_path)
    assert done.returncode == (1 if failing else 0), done.stderr
    output = done.stdout.splitlines()
    assert output.index("made audit") < output.index("made test") < output.index("made test-slow")
    slowest = output.index("== the slowest tests")
    assert output[slowest + 1].startswith("61.20s")
    assert output[slowest + 2].startswith("7.50s")
    assert output[-1] == (f"== failed: {failing}" if failing else "== all passed")
