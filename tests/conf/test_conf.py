"""Every YAML in conf/ loads in the place it is meant for, and every job explains itself."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import CONF, compose, group_names, load
from pipelines.methods import METHODS
from pipelines.ood import SCORES
from pipelines.records import SetName
from pipelines.score.by_name import FITTED
from pipelines.settings.config import PipelineConfig
from pipelines.sweep.space import settings, with_values

ROOT = CONF.parent
JOBS = sorted(p.stem for p in (ROOT / "jobs").glob("*.py") if "__main__" in p.read_text())
GROUPS = ("backbone", "benchmark", "compute", "method", "sweep")
# A preset for each sweep that is about a method or two.
ABOUT_METHODS = ("balanced", "delta_energy", "margins", "prompts", "templates")
OF_CLASSIFIERS = {"classifier", "logit_adjustment", "oecc", "open_sampling", "pascl"}
# Further files of methods that train whole networks.
NETWORKS = {
    "network_adjusted_logits", "network_balanced", "network_cross_entropy", "network_energy",
    "network_outlier_exposure", "pascl_branch", "small_network", "small_network_energy",
}  # fmt: skip
RESULTS = (
    "results_all", "results_cifar10_lt", "results_cifar10_outliers", "results_densities",
    "results_digits", "results_imagenet", "results_networks", "results_pacs",
)  # fmt: skip
RECIPES = (
    "chen2024", "choi2023", "jiang2024", "lafon2022", "liu2020", "ming2022", "zhu2025",
)  # fmt: skip
PRESETS = (*ABOUT_METHODS, "demo", "paper", *RECIPES, *RESULTS, "streams", "test")
# Files that a job loads by another name than its own.
OTHERS = ("embed_folder",)


def run(job: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m jobs.JOB words...` does, in this process."""
    monkeypatch.setattr(sys, "argv", [job, *words])
    runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")


def pipeline(*words: str) -> PipelineConfig:
    return load(PipelineConfig, "pipeline", words)


def test_every_file_has_its_place() -> None:
    files = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}
    top = {f"{name}.yaml" for name in (*JOBS, *PRESETS, *OTHERS)}
    grouped = {f"{group}/{name}.yaml" for group in GROUPS for name in group_names(group)}
    assert files == top | grouped


@pytest.mark.parametrize("job", JOBS)
def test_help_lists_every_key_with_type_default_and_meaning(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job, "--help", "all", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert f"usage: python -m jobs.{job} [key=value ...]" in lines
    rows = [n for n, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert rows
    for n in rows:
        key, equals, rest = lines[n].strip().partition("=")
        value, bracket, kind = rest.rpartition("  [")
        assert key, lines[n]
        assert equals, lines[n]
        assert bracket, lines[n]
        json.loads(value)
        assert kind.endswith("]"), lines[n]
        assert "Annotated" not in kind, lines[n]
        assert lines[n + 1].startswith("      "), f"{key} has no meaning"
    # The values are those of conf/, laid over the defaults.
    stored = yaml.safe_load((CONF / f"{job}.yaml").read_text())
    shown = {line.strip().partition("=")[0]: line for line in lines}
    for key, value in stored.items():
        if not isinstance(value, dict | list) and key != "extends" and key in shown:
            assert f"{key}={json.dumps(value)}" in shown[key]


@pytest.mark.parametrize("job", JOBS)
def test_a_mistake_is_a_line_and_exit_status_2(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(job, "no_such_key=1", "word", monkeypatch=monkeypatch)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert any("no_such_key: unknown key; allowed: " in line for line in lines)


@pytest.mark.parametrize("name", group_names("benchmark"))
def test_benchmarks(name: str) -> None:
    config = pipeline(f"benchmark={name}", "sweep=none").benchmark
    assert config.name == name
    roles = {SetName.parse(set_name).role for set_name in config.sets}
    assert {"test", "ood"} <= roles
    files = [c.partition("#") for s in config.sets.values() for c in (s.classes or [])]
    for file, mark, key in files:
        if mark:
            assert json.loads((CONF / "benchmark" / file).read_text())[key]


@pytest.mark.parametrize("name", group_names("backbone"))
def test_backbones(name: str) -> None:
    config = pipeline(f"backbone={name}").backbone
    assert config.name == name
    assert config.kind == "mini" or config.model or config.config


@pytest.mark.parametrize("name", group_names("method"))
def test_methods(name: str) -> None:
    (method,) = pipeline(f"methods=[{name}]").methods.values()
    assert method.score in SCORES or method.score in FITTED
    assert type(method) is METHODS[method.name].Config
    # What the file says is what is loaded.
    stored = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    stored.pop("in_all", None)
    assert_within(stored, method.model_dump(mode="json"))


def assert_within(part: Any, whole: Any) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            assert_within(value, whole[key])
    elif isinstance(whole, dict):  # a backbone by its name
        assert part == whole["name"]
    else:
        assert part == whole


def test_all_methods_together_use_every_method_of_the_code() -> None:
    methods = pipeline("methods=all").methods
    assert set(methods) == set(group_names("method")) - OF_CLASSIFIERS - NETWORKS
    assert {method.name for method in methods.values()} == set(METHODS) - OF_CLASSIFIERS
    # What is left out is what a vision-language model cannot give.
    assert {
        n for n in METHODS if METHODS[n].Config().head.needs == ("classifier",)
    } == OF_CLASSIFIERS


@pytest.mark.parametrize("name", group_names("sweep"))
def test_sweeps(name: str) -> None:
    config = pipeline(f"sweep={name}").sweep
    assert config.enabled == (name != "none")
    every = pipeline("methods=all").methods
    trained = {n for n, m in every.items() if m.head.trainable}
    if name == "default":  # the budget is every trained method's
        assert trained == set(config.completed(every).space)
    # Each part of the space is a method's, and settings drawn from it are accepted.
    for method, space in config.space.items():
        section = pipeline(f"methods=[{method}]").methods[method]
        drawn = settings(section, space, sampler="random", num_samples=40, seed=0)
        assert {key for values in drawn for key in values} == set(space)
        for values in drawn:
            with_values(section, values)


@pytest.mark.parametrize("name", ABOUT_METHODS)
def test_a_preset_names_a_sweep_and_the_methods_that_it_is_about(name: str) -> None:
    config = pipeline(f"preset={name}")
    assert config.sweep == pipeline(f"sweep={name}").sweep
    assert set(config.methods) >= set(config.sweep.space) - NETWORKS
    other = pipeline(f"preset={name}", "methods=[coop]", "scores=[mcm]")
    assert (list(other.methods), other.scores) == (["coop"], ["mcm"])


@pytest.mark.parametrize("name", group_names("compute"))
def test_computes(name: str) -> None:
    config = pipeline(f"compute={name}").compute
    assert (config.address == "local") == (name == "local")


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    stored = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    named = sorted({key.split(".")[1] for key in stored if key.startswith("methods.")})
    methods = stored.get("methods", named)
    if methods == "all":
        methods = [name for name in group_names("method") if name not in OF_CLASSIFIERS | NETWORKS]
    config = pipeline(f"preset={name}", f"methods=[{','.join(methods)}]")
    for key, value in stored.items():
        node: Any = config.model_dump(mode="json")
        if key in GROUPS or key == "methods" or value == "all" or "${" in str(value):
            continue
        if key.startswith(("benchmark.sources.", "benchmark.sets.")):
            assert key.split(".")[2] in node["benchmark"][key.split(".")[1]]
            continue
        for part in key.split("."):
            node = node[part]
        if isinstance(value, str) and "${" in value:  # a place that the environment names
            assert node.endswith(value.rpartition("}")[2])
            continue
        assert node == value
    assert list(config.methods) == methods
    if "methods" in stored:
        assert list(pipeline(f"preset={name}").methods) == methods


def test_files_name_no_machine() -> None:
    for path in [p for p in CONF.rglob("*") if p.is_file()]:
        text = path.read_text()
        for word in ("/home/", "/work/", "/tmp/", str(Path.home())):
            assert word not in text, path


def test_short_words_stand_for_the_dotted_keys_of_embed() -> None:
    words = ["source=x", "max_rejected=0.2", "exif=apply", "background=black"]
    data, problems = compose("embed_folder", words)
    assert problems == []
    assert data["embed"] == {"max_rejected": 0.2, "exif": "apply", "background": "black"}
