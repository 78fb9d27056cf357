"""The commit hooks: valid, local, and run by the tools of the lock file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".pre-commit-config.yaml"
# The command's name where it differs from the package's.
PACKAGES = {"lint-imports": "import-linter", "python": "pytest"}


def hooks() -> list[dict[str, Any]]:
    content = yaml.safe_load(FILE.read_text())
    assert [repository["repo"] for repository in content["repos"]] == ["local"]
    found: list[dict[str, Any]] = content["repos"][0]["hooks"]
    return found


def test_pre_commit_accepts_the_file() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hooks_run_locked_tools_of_this_folder() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    for hook in hooks():
        assert hook["language"] == "system"
        command = hook["entry"].split()[0]
        assert command.startswith(".venv/bin/"), hook["entry"]
        name = command.removeprefix(".venv/bin/")
        assert re.search(rf"^{PACKAGES.get(name, name)}==", lock, re.MULTILINE), name


def test_make_and_the_hooks_run_the_same_checks() -> None:
    makefile = (ROOT / "Makefile").read_text()
    entries = " ".join(hook["entry"].replace(".venv/bin/", "") for hook in hooks())
    for check in ("ruff format", "ruff check", "mypy", "lint-imports"):
        assert re.search(rf"^\t@{check}", makefile, re.MULTILINE), check
        assert check in entries
