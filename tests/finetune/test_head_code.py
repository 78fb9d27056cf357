"""An edit changes the addresses of the heads that it can decide, and of no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.data import kept
from pipelines.data.storage import Storage
from pipelines.finetune.cache import head_code, read_record
from pipelines.finetune.record import HeadRecord
from pipelines.methods import METHODS as PLUGINS

ROOT = Path(__file__).resolve().parents[2]
# Learned prompts; the same with margins and outliers; another head.
METHODS = ("coop", "energy_margin", "croft")
NEW_HEAD = (ROOT / "pipelines" / "heads" / "croft.py").read_text().replace('"croft"', '"added"')
NEW_METHOD = (ROOT / "pipelines" / "methods" / "coop.py").read_text().replace('"coop"', '"added"')


def digests(root: Path) -> list[str]:
    return [head_code(PLUGINS[name].Config(), root=root).digest for name in METHODS]


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("methods/optimization.py", "(1 + math.cos(", "(1.5 + math.cos(", METHODS),
        ("finetune/loop.py", "share = len(part) / len(rows)", "share = 1.0", METHODS),
        ("heads/coop.py", "base.normal(shape, 0.02, seed)", "base.normal(shape, 0.03, seed)",
         ("coop", "energy_margin")),
        ("heads/croft.py", "torch.eye(", "0.5 * torch.eye(", ("croft",)),
        ("methods/margins.py", "return Margins(m_in=m_in,", "return Margins(m_in=m_in - 1,",
         ("energy_margin",)),
        ("ood/losses.py", "return (id_energy - m_in).relu().square()",
         "return 2 * (id_energy - m_in).relu().square()", ("energy_margin",)),
        ("backbones/text_tower.py", "queries * dim**-0.5", "queries * dim**-0.4",
         ("coop", "energy_margin")),
        ("heads/parallel.py", "return gradient * ctx.factor, None", "return gradient, None",
         METHODS),
        # What judges, another method's loss, and what no training reads.
        ("ood/scores.py", "logits: Array, tau: float = 1.0", "logits: Array, tau: float = 2.0", ()),
        ("ood/losses.py", "log_softmax(dim=1).mean()", "log_softmax(dim=1).sum()", ()),
        ("methods/locoop.py", "max(1, len(entropies))", "max(2, len(entropies))", ()),
        ("heads/clip_adapter.py", "max(1, dim", "max(2, dim", ()),
        ("finetune/workers.py", "CLASS_PARALLEL_FROM = 64", "CLASS_PARALLEL_FROM = 65", ()),
        ("heads/added.py", "", NEW_HEAD, ()),
        ("methods/added.py", "", NEW_METHOD, ()),
    ],
)  # fmt: skip
def test_an_edit_changes_the_addresses_that_it_can_decide(
    tmp_path: Path, file: str, old: str, new: str, changed: tuple[str, ...]
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines", ignore=ignored)
    path = tmp_path / "pipelines" / file
    text = path.read_text() if path.exists() else ""
    assert old in text
    path.write_text(text.replace(old, new, 1) if text else new)
    pairs = zip(METHODS, digests(ROOT), digests(tmp_path), strict=True)
    assert tuple(name for name, was, now in pairs if was != now) == changed


def test_a_record_of_another_layout_is_refused_with_its_path(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    record = HeadRecord(
        setting={"name": "coop"}, seed=0, data="d", code="c", best_epoch=1, history=({"loss": 1.0},)
    )
    place = ("cache", "heads", "a", "manifest.json")
    kept.write_record(storage, record, *place)
    assert read_record(storage, "a") == record
    kept.write_record(storage, record.model_copy(update={"version": 0}), *place)
    with pytest.raises(UserError, match=r"heads/a/manifest\.json: not a HeadRecord"):
        read_record(storage, "a")
