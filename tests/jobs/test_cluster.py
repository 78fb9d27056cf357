"""cluster.yaml against Ray's own schema, and against the files and options that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray.scripts.scripts
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return content


def test_rays_schema_accepts_it(cluster: dict[str, Any]) -> None:
    filled = prepare_config(cluster)
    validate_config(filled)
    assert filled["max_workers"] >= filled["available_node_types"]["gpu_worker"]["max_workers"]


def test_rays_schema_refuses_a_typo(cluster: dict[str, Any]) -> None:
    broken = {**cluster, "idle_timeout": 10}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(broken))


def test_the_workers_come_and_go(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] == "head"
    assert types["gpu_worker"]["min_workers"] == 0
    assert cluster["idle_timeout_minutes"] > 0


def test_mounted_files_are_in_the_repository(cluster: dict[str, Any]) -> None:
    own = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert own
    for path in own:
        assert (ROOT / path).is_file(), path


def test_commands_use_what_was_mounted_or_made(cluster: dict[str, Any]) -> None:
    home = f"/home/{cluster['auth']['ssh_user']}"
    made = {f"{home}/energy-ood/.venv", *cluster["file_mounts"]}
    commands = [
        *cluster["setup_commands"],
        *cluster["head_start_ray_commands"],
        *cluster["worker_start_ray_commands"],
    ]
    named = {p for c in commands for p in re.findall(r"~/energy-ood/[^\s'\":;]+", c)}
    assert named
    for path in named:
        whole = path.replace("~", home, 1)
        assert any(whole == known or whole.startswith(f"{known}/") for known in made), path


@pytest.mark.parametrize("group", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_start_has_the_options(cluster: dict[str, Any], group: str) -> None:
    known = {o for p in ray.scripts.scripts.start.params for o in p.opts}
    starts = [c for c in cluster[group] if "ray start" in c]
    assert len(starts) == 1
    options = re.findall(r"(--[a-z-]+)", starts[0].partition("ray start")[2])
    assert options
    assert set(options) <= known


def test_the_python_is_the_projects(cluster: dict[str, Any]) -> None:
    wanted = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted
    venv = next(c for c in cluster["setup_commands"] if "uv venv" in c)
    assert f"--python '{wanted[1]}'" in venv


def test_the_command_in_its_head_names_a_job_and_a_group() -> None:
    comment = " ".join(line.lstrip("# \\") for line in FILE.read_text().splitlines()[:6])
    job = re.search(r"python -m jobs\.(\w+)", comment)
    assert job
    assert (ROOT / "jobs" / f"{job[1]}.py").is_file()
    compute = re.search(r"compute=(\w+)", comment)
    assert compute
    assert (ROOT / "conf" / "compute" / f"{compute[1]}.yaml").is_file()
