"""`--help`: what users set most on one screen, every key with `all`, and no waiting for either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from jobs import help as job_help
from pipelines import config
from pipelines.config import CONF, ConfigError, Section
from pipelines.settings.config import PipelineConfig
from tests.patience import PATIENCE

# Imports that a command which only answers has no use for.
HEAVY = ("torch", "ray", "mlflow", "open_clip", "pandas", "sklearn", "matplotlib", "pyarrow")
# The sections of a run say which columns an index has, in pyarrow's words.
WITHOUT_TORCH = (*(name for name in HEAVY if name != "pyarrow"), "aiohttp")


class Engine(Section):
    address: str = Field("local", description="where")


class Toy(Section):
    kind: Literal["toy"] = "toy"
    engine: Engine = Engine()
    color: Literal["red", "green"] = Field("red", description="of the toy")
    sizes: list[int] = Field([], description="in order")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small conf/ of its own."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "here.yaml").write_text("address: here\n")
    (tmp_path / "toy.yaml").write_text("engine: here\n")
    monkeypatch.setattr(config, "CONF", tmp_path)
    monkeypatch.setattr(job_help, "CONF", tmp_path)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("words", [["sizes=[7]"], ["sizes=[7]", "all"]])
def test_every_key_has_its_value_type_and_meaning(words: list[str]) -> None:
    lines = job_help.text("toy", lambda: Toy, words, "What it does.").splitlines()
    assert lines[0] == "What it does."
    assert "usage: python -m jobs.toy [key=value ...]" in lines
    for row, meaning in {
        '  engine.address="here"  [str]': "where",
        '  color="red"  [red | green]': "of the toy",
        "  sizes=[7]  [list[int]]": "in order",
        '  kind="toy"  [toy]': "which kind of section this is",
    }.items():
        assert lines[lines.index(row) + 1] == f"      {meaning}"
    assert "groups (conf/GROUP/NAME.yaml): engine." in lines


@pytest.mark.parametrize("job", job_help.RUN_JOBS)
def test_a_run_jobs_help_fits_on_a_screen(job: str) -> None:
    text = job_help.text(job, lambda: PipelineConfig, ["seeds=7", "benchmark=pacs"], "About.")
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("  seeds=7 ") for line in lines)
    assert any(line.startswith("  benchmark=pacs ") for line in lines)
    assert f"python -m jobs.{job} --help all" in text


def test_what_it_shows_are_keys_of_a_run() -> None:
    known = set(PipelineConfig.model_fields) | {"preset", "allow_env"}
    assert {key.partition(".")[0] for key in job_help.MOST_SET} <= known
    presets = set(job_help._names("preset"))
    jobs = {path.stem for path in (CONF.parent / "jobs").glob("*.py")} | {"embed_folder"}
    assert presets
    assert not presets & jobs


def test_a_word_that_cannot_be_read_is_a_mistake_here_too() -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        job_help.text("pipeline", lambda: PipelineConfig, ["seeds"], "")


# A count of imports, not of seconds: `suite=startup` measures those.
@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        ("jobs.pipeline --help", HEAVY),
        ("jobs.predict --help", HEAVY),
        ("jobs.predict sorce=1", HEAVY),
        ("jobs.benchmark suit=1", HEAVY),
        ("jobs.figures figur=1", HEAVY),
        ("jobs.pipeline bakcbone=x", WITHOUT_TORCH),
        ("jobs.sweep methods=[coop] preset=test sweep.sampler=best", WITHOUT_TORCH),
        ("jobs.score methods=[coopp]", WITHOUT_TORCH),
    ],
)
def test_a_command_that_only_answers_imports_nothing_heavy(
    words: str, heavy: tuple[str, ...]
) -> None:
    command = [sys.executable, "-X", "importtime", "-m", *words.split()]
    done = subprocess.run(
        command, cwd=CONF.parent, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == (0 if "--help" in words else 2)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "omegaconf" in imported
    assert not imported & set(heavy)
