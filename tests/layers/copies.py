"""A copy of the tree in which a test adds a plug-in or breaks a rule, and what it touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COPIED = ("pipelines", "jobs", "conf")


def copy_tree(folder: Path) -> Path:
    """The packages, the configuration and the toy of the tests, in `folder`."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name)  # with what is compiled: times are kept
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "small_clip.py", folder / "tests")
    return folder


def touched(tree: Path) -> set[str]:
    """The files of the copy that are new or changed."""
    files = (path for name in COPIED for path in (tree / name).rglob("*") if path.is_file())
    names = (path.relative_to(tree) for path in files if "__pycache__" not in path.parts)
    return {str(name) for name in names if not _same(tree / name, ROOT / name)}


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()


def run(tree: Path, program: str) -> Any:
    """What a Python program in the copy prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
