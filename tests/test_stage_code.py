"""An edit of the code repeats the stages that it can decide, and says so; no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines import code_digest
from pipelines.config import load
from pipelines.pipeline import STAGES, stage_code
from pipelines.settings.config import PipelineConfig

ROOT = Path(__file__).resolve().parents[1]
ALL = tuple(STAGES)


@pytest.fixture(scope="module")
def config() -> PipelineConfig:
    return load(PipelineConfig, "pipeline", ["methods=[coop,ebm]", "scores=[mcm,delta_energy]"])


@pytest.fixture(scope="module")
def before(config: PipelineConfig) -> dict[str, str]:
    return {name: stage_code(name, config).digest for name in STAGES}


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        # A score and a metric that judge.
        ("ood/scores.py", "return gap.sign() * torch", "return 2 * gap.sign() * torch",
         ("sweep", "finetune", "score", "register")),
        ("ood/curves.py", "def auroc_bound", "_SINCE = 1\n\n\ndef auroc_bound", ()),
        ("score/judge.py", "BLOCK_ROWS = 256", "BLOCK_ROWS = 128", ("score", "register")),
        # The loop, a head, a loss; the sampler of a sweep; how the champion is chosen.
        ("finetune/loop.py", "share = len(part) / len(rows)", "share = 1.0",
         ("sweep", "finetune")),
        ("heads/coop.py", "base.normal(shape, 0.02, seed)", "base.normal(shape, 0.03, seed)",
         ("sweep", "finetune", "score", "register")),
        ("sweep/space.py", "random = np.random.default_rng(seed)",
         "random = np.random.default_rng(seed + 1)", ("sweep",)),
        ("register/choose.py", "return max(pairs, key=lambda pair: pair[:2])[2]",
         "return min(pairs, key=lambda pair: pair[:2])[2]", ("register",)),
        ("report/screen.py", "def summary(", "_SINCE = 1\n\n\ndef summary(", ()),
        ("report/text.py", "def text_table(", "_SINCE = 1\n\n\ndef text_table(", ()),
        # Plug-ins and scores that the run does not use.
        ("heads/gallop.py", "PLUGIN = HeadPlugin(", "_SINCE = 1\nPLUGIN = HeadPlugin(", ()),
        ("methods/locoop.py", "max(1, len(entropies))", "max(2, len(entropies))", ()),
        ("ood/density.py", "def _residual_space(", "_SINCE = 1\n\n\ndef _residual_space(", ()),
        ("embed/own_images.py", "def run(", "_SINCE = 1\n\n\ndef run(", ()),
    ],
)  # fmt: skip
def test_an_edit_repeats_the_stages_that_it_can_decide(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: PipelineConfig,
    before: dict[str, str],
    file: str,
    old: str,
    new: str,
    changed: tuple[str, ...],
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines", ignore=ignored)
    path = tmp_path / "pipelines" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(code_digest, "ROOT", tmp_path)
    now = {name: stage_code(name, config).digest for name in STAGES}
    assert tuple(name for name in ALL if now[name] != before[name]) == changed


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("sweep/choice.py", "return max(accurate,", "return min(accurate,"),
        (
            "sweep/network_trial.py",
            "1.0,\n        data.class_names",
            "2.0,\n        data.class_names",
        ),
        ("ood/scores.py", "def energy(", "def energy(edited, "),
    ],
)
def test_what_chooses_networks_repeats_their_training_only_where_they_are_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, old: str, new: str
) -> None:
    words = ["methods=[network_energy]", "scores=[energy]"]
    runs = {
        name: load(PipelineConfig, "pipeline", [*words, f"sweep={name}"])
        for name in ("margins", "balanced", "none")
    }
    before = {name: stage_code("train", config).digest for name, config in runs.items()}
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines", ignore=ignored)
    path = tmp_path / "pipelines" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(code_digest, "ROOT", tmp_path)
    now = {name: stage_code("train", config).digest for name, config in runs.items()}
    # `balanced` searches another method's networks.
    assert [name for name in runs if now[name] != before[name]] == ["margins"]
