"""import-linter sees a forbidden import: each is planted in a copy of the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers.copies import copy_tree

LINT = str(Path(sys.executable).parent / "lint-imports")

# Module, what it imports now, and a word of the contract that this breaks.
PLANTED = [
    ("pipelines.ood.scores", "pipelines.score.judge", "point down"),
    ("pipelines.heads.zero_shot", "pipelines.finetune.loop", "point down"),
    ("pipelines.embed.plan", "jobs.console", "point down"),
    ("pipelines.fitted.fit", "pipelines.evaluate.stage", "point down"),
    ("pipelines.settings.config", "pipelines.experiments.demo", "point down"),
    ("pipelines.embed.plan", "pipelines.train.images", "point down"),
    ("pipelines.train.augment", "ray", "Ray and MLflow"),
    ("pipelines.methods.ebm", "ray", "Ray and MLflow"),
    ("pipelines.heads.coop", "ray.util", "Ray and MLflow"),
    ("pipelines.backbones.encoder", "ray.data", "Ray and MLflow"),
    ("pipelines.finetune.loop", "ray.train", "Ray and MLflow"),
    ("pipelines.register.detector", "mlflow", "Ray and MLflow"),
    ("pipelines.ood.energy", "pydantic", "the maths"),
]


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT, "--no-cache"], cwd=tree, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def said(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy with every planted import."""
    tree = tmp_path_factory.mktemp("planted") / "tree"
    shutil.copytree(clean, tree)
    for module, imported, _ in PLANTED:
        path = (tree / module.replace(".", "/")).with_suffix(".py")
        path.write_text(f"{path.read_text()}\nimport {imported}\n")
    done = lint(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_the_tree_as_it_is_keeps_every_contract(clean: Path) -> None:
    done = lint(clean)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("module", "imported", "contract"), PLANTED)
def test_a_forbidden_import_is_found(said: str, module: str, imported: str, contract: str) -> None:
    external = imported.partition(".")[0] if not imported.startswith("pipelines") else imported
    target = imported if imported.startswith(("pipelines", "jobs")) else external
    assert f"- {module} -> {target} (l." in said or f"  {module} -> {target} (l." in said
    assert any(contract in line and line.endswith(" BROKEN") for line in said.splitlines())
