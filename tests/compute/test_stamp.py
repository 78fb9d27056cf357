"""The stamp says which commit, lock file and versions computed a number."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from pipelines.compute import stamp as stamps
from pipelines.compute.stamp import stamp

ROOT = Path(__file__).parents[2]


def test_the_stamp_names_commit_lock_and_versions():
    facts = stamp(run="abc", seed=3)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert facts["git.commit"] == head.stdout.strip()
        assert facts["git.dirty"] in ("true", "false")
    lock = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert lock.startswith(facts["lock"])
    assert len(facts["lock"]) == 16
    import torch

    assert facts["version.torch"] == torch.__version__.partition("+")[0]
    assert (facts["version"], facts["run"], facts["seed"]) == ("0.1.0", "abc", "3")
    assert all(isinstance(value, str) for value in facts.values())


def test_outside_a_checkout_the_stamp_says_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "PROJECT", tmp_path)
    facts = stamp()
    assert [facts[k] for k in ("git.commit", "git.dirty", "lock")] == ["unknown"] * 3
