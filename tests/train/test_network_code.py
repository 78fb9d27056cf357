"""An edit changes the addresses of the networks that it can decide, and of no other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import code_digest
from pipelines.config import load
from pipelines.methods.base import TrainingConfig
from pipelines.pipeline import STAGES, stage_code
from pipelines.settings.config import PipelineConfig
from pipelines.train.cache import network_code
from tests.train.test_stage import NEW
from tests.train.toy import job

ROOT = Path(__file__).resolve().parents[2]
TRAINING = TrainingConfig(epochs=1, warmup_epochs=0)
METHODS = ("cross_entropy", "energy_margin", "outlier_exposure", "pascl")
OTHER_MARGIN = "return (id_energy - m_in).relu().square().mean() + (m_out"
NEW_METHOD = (ROOT / "pipelines" / "methods" / "oecc.py").read_text().replace('"oecc"', '"added"')


def copy(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the project with one edit."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pipelines", folder / "pipelines", ignore=ignored)
    path = folder / "pipelines" / file
    text = path.read_text() if path.exists() else ""
    assert text.count(old) == 1 or not text
    path.write_text(text.replace(old, new) if text else new)
    return folder


def digests(root: Path) -> list[str]:
    works = [replace(job(name, TRAINING), backbone=NEW) for name in METHODS]
    return [network_code(work.method, work.backbone, root=root).digest for work in works]


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        # The loop, what it is fed, how it moves the weights.
        ("train/loop.py", "share = len(part.rows) / len(step.rows)", "share = 1.0", METHODS),
        ("train/batches.py", "or 2 * config.batch_size", "or config.batch_size", METHODS),
        ("train/augment.py", "Purpose.FLIP, 1)[:, 0] < 0.5", "Purpose.FLIP, 1)[:, 0] < 0.6",
         METHODS),
        ("train/colours.py", "(0.2989, 0.587, 0.114)", "(0.3, 0.59, 0.11)", METHODS),
        ("methods/optimization.py", "(1 + math.cos(", "(1.5 + math.cos(", METHODS),
        ("heads/parallel.py", "return gradient[ctx.part], None, None",
         "return 2 * gradient[ctx.part], None, None", METHODS),
        ("backbones/trainable.py", ".div_(255)", ".div_(256)", METHODS),
        # A loss is its methods' own.
        ("ood/losses.py", OTHER_MARGIN, f"return 1.0 * {OTHER_MARGIN.removeprefix('return ')}",
         ("energy_margin",)),
        ("ood/losses.py", "log_softmax(dim=1).mean()", "log_softmax(dim=1).sum()",
         ("outlier_exposure", "pascl")),
        ("methods/margins.py", "return Margins(m_in=m_in,", "return Margins(m_in=m_in - 1,",
         ("energy_margin",)),
        ("ood/classifier_losses.py", "return costs.sum() / max(1, count)",
         "return costs.sum() / max(2, count)", ("pascl",)),
        # Another method's loss, another architecture, what judges, stores and reports.
        ("ood/classifier_losses.py", "(confidence - train_accuracy).square().sum()",
         "(confidence - train_accuracy).square().mean()", ()),
        ("methods/added.py", "", NEW_METHOD, ()),
        ("heads/parallel.py", "return gradient * ctx.factor, None", "return gradient, None", ()),
        ("ood/scores.py", "return gap.sign() * torch", "return 2 * gap.sign() * torch", ()),
        ("finetune/loop.py", "share = len(part) / len(rows)", "share = 1.0", ()),
        ("evaluate/stage.py", "def run(", "_SINCE = 1\n\n\ndef run(", ()),
        ("report/text.py", "def text_table(", "_SINCE = 1\n\n\ndef text_table(", ()),
        ("train/cache.py", "def keep(", "_SINCE = 1\n\n\ndef keep(", ()),
        ("train/images.py", "READ_ROWS, BLOCK_ROWS = 1024, 256", "READ_ROWS, BLOCK_ROWS = 512, 128",
         ()),
    ],
)  # fmt: skip
def test_an_edit_changes_the_addresses_that_it_can_decide(
    tmp_path: Path, file: str, old: str, new: str, changed: tuple[str, ...]
) -> None:
    edited = copy(tmp_path, file, old, new)
    pairs = zip(METHODS, digests(ROOT), digests(edited), strict=True)
    assert tuple(name for name, was, now in pairs if was != now) == changed


WORDS = (
    "backbone=cifar10_resnet20", "benchmark=cifar10_outliers", "shots=null", "sweep=none",
    "methods=[classifier,network_energy]", "scores=[energy,knn]",
)  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("train/loop.py", "share = len(part.rows) / len(step.rows)", "share = 1.0", ("train",)),
        ("train/images.py", "READ_ROWS, BLOCK_ROWS = 1024, 256", "READ_ROWS, BLOCK_ROWS = 512, 128",
         ("train",)),
        ("train/prior.py", "AT_ONCE = 20_000", "AT_ONCE = 10_000", ("train",)),
        ("score/judge.py", "BLOCK_ROWS = 256", "BLOCK_ROWS = 128", ("score", "register")),
        ("methods/oecc.py", "PLUGIN = MethodPlugin(", "_SINCE = 1\nPLUGIN = MethodPlugin(", ()),
        ("report/text.py", "def text_table(", "_SINCE = 1\n\n\ndef text_table(", ()),
    ],
)  # fmt: skip
def test_an_edit_repeats_the_training_of_networks_where_it_can_decide_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    file: str,
    old: str,
    new: str,
    changed: tuple[str, ...],
) -> None:
    config = load(PipelineConfig, "pipeline", WORDS)
    before = {name: stage_code(name, config).digest for name in STAGES}
    monkeypatch.setattr(code_digest, "ROOT", copy(tmp_path, file, old, new))
    now = {name: stage_code(name, config).digest for name in STAGES}
    assert tuple(name for name in STAGES if now[name] != before[name]) == changed
