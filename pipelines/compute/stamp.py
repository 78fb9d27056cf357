"""The stamp of a number: the commit, the lock file and the library versions that computed it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "open_clip_torch", "ray", "mlflow", "numpy")


def stamp(**facts: object) -> dict[str, str]:
    """Where a number comes from: commit, lock file, versions; and `facts`, as strings."""
    lock = PROJECT / "requirements.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "unknown"
    return {
        **_commit(),
        "lock": digest[:16],
        "python": platform.python_version(),
        "version": _project_version(),
        **{f"version.{name}": _version(name) for name in LIBRARIES},
        **{key: str(value) for key, value in facts.items()},
    }


def _commit() -> dict[str, str]:
    try:
        sha = _git("rev-parse", "HEAD")
        dirty = bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return {"git.commit": "unknown", "git.dirty": "unknown"}
    return {"git.commit": sha, "git.dirty": str(dirty).lower()}


def _git(*words: str) -> str:
    # The project's own repository, or none: never one that an installed copy happens to lie in.
    if not (PROJECT / ".git").exists():
        raise FileNotFoundError(PROJECT / ".git")
    done = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _project_version() -> str:
    """The project's own version, installed or as a checkout."""
    file = PROJECT / "pyproject.toml"
    if not file.is_file():
        return _version("energy-ood")
    return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"])
