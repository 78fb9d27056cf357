"""The tools of tests/golden: reading a run, writing a recording, comparing two of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import commits, figures
from tests.golden.compare import compare, exact, machine
from tests.golden.recording import FOLDER, Recording


def recording(**values: float) -> Recording:
    return Recording("some", {"ebm + energy": values})


def test_a_recording_reads_as_it_was_written(tmp_path: Path) -> None:
    some = recording(id_accuracy=0.9930715935334873, threshold=-1.25e-22)
    path = some.write(tmp_path)
    assert path.name == "some.json"
    assert Recording.read(path).table == {
        "ebm + energy": {"id_accuracy": 0.9930715935, "threshold": -1.25e-22}
    }


@pytest.mark.parametrize(
    ("column", "a", "b", "is_exact", "on_a_machine"),
    [
        ("id_accuracy", 0.5, 0.5 + 1e-12, True, True),  # beyond the recorded digits
        ("id_accuracy", 0.5, 0.509, False, True),
        ("auroc/near", 0.5, 0.511, False, False),
        ("threshold", 5.0, 5.04, False, True),
        ("threshold", 5.0, 5.06, False, False),
        ("params/tau", 1.0, 1.01, False, False),
        ("head/similarity/0", 0.25, 0.2502, False, True),
        ("head/similarity/0", 0.25, 0.2503, False, False),
        ("head/similarity/0", float("nan"), float("nan"), True, True),
        ("head/similarity/0", 0.25, float("nan"), False, False),
    ],
)
def test_a_number_moved_beyond_the_tolerance_or_not(
    column: str, a: float, b: float, is_exact: bool, on_a_machine: bool
) -> None:
    pair = recording(**{column: a}), recording(**{column: b})
    assert (compare(*pair, exact) == []) is is_exact
    assert (compare(*pair, machine) == []) is on_a_machine


def test_every_number_that_moved_appeared_or_went_is_a_line() -> None:
    a = Recording("a", {"one": {"x": 1.0, "y": 2.0}, "two": {"x": 3.0}})
    b = Recording("b", {"one": {"x": 1.5, "y": 2.0, "z": 4.0}})
    assert list(map(str, compare(a, b))) == [
        "one: x 1 -> 1.5 (+0.5)",
        "one: z nothing -> 4",
        "two: x 3 -> nothing",
    ]


def test_the_command_ends_with_status_1_where_a_number_moved(tmp_path: Path) -> None:
    paths = []
    for number, value in enumerate((1.0, 1.5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(str(recording(threshold=value).write(folder)))
    command = [sys.executable, "-m", "tests.golden.compare"]
    moved = subprocess.run([*command, *paths], cwd=commits.ROOT, capture_output=True, text=True)
    assert moved.returncode == 1
    assert moved.stdout.splitlines()[-1] == "some: 1 of 1 numbers moved"
    same = subprocess.run([*command, paths[0], paths[0]], cwd=commits.ROOT, capture_output=True)
    assert same.returncode == 0


def test_the_figures_of_a_run_are_read_from_its_metrics(tmp_path: Path) -> None:
    row = {
        "method": "coop",
        "score": "delta_energy",
        "id_accuracy": {"mean": 0.9, "std": 0.1},
        "auroc": {"near": {"mean": 0.8, "std": 0.0}},
        "fpr": {"near": {"mean": 0.3, "std": 0.0}},
        "threshold": {"value": 2.5, "low": 2.0, "high": 3.0, "num": 10},
        "params": {"tau": 0.5, "c": 2},
    }
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [row]}))
    assert figures.read("demo", tmp_path).table == {
        "coop + delta_energy": {
            "id_accuracy": 0.9,
            "auroc/near": 0.8,
            "fpr/near": 0.3,
            "threshold": 2.5,
            "params/tau": 0.5,
            "params/c": 2.0,
        }
    }


def test_every_run_is_recorded_whole() -> None:
    for name in figures.RUNS:
        recorded = Recording.read(FOLDER / f"{name}.json")
        assert recorded.name == name
        for row in recorded.table.values():
            assert {"id_accuracy", "ood_accuracy", "auroc/mean", "fpr/mean", "threshold"} <= set(
                row
            )


def test_a_commit_is_checked_out_and_gone_again(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (repository / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    (repository / "file").write_text("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "ROOT", repository)
        with commits.checked_out("HEAD", tmp_path / "tree") as tree:
            assert (tree / "file").read_text() == "one"
    assert not (tmp_path / "tree").exists()
    assert (repository / "file").read_text() == "two"
