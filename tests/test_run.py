"""Which run a configuration names, which stage may run, and which model is registered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY, Mock

import pytest

from pipelines.backbones import mini
from pipelines.config import UserError, load
from pipelines.data.storage import Storage
from pipelines.pipeline import run
from pipelines.run import Run
from pipelines.settings.config import PipelineConfig


class Quiet:
    """An observer that says nothing."""

    def started(self, stage: str, number: int, total: int, reason: str = "") -> None: ...

    def progress(self, done: int, total: int, note: str = "") -> None: ...

    def finished(self, stage: str, seconds: float, *, found: bool, note: str = "") -> None: ...


@pytest.fixture
def settings(mini_storage: Storage, tmp_path: Path) -> Callable[..., PipelineConfig]:
    """The test preset with more words, on a storage of its own that has the backbone."""
    folder = ("cache", "backbones")
    shutil.copytree(mini_storage.local(*folder), tmp_path.joinpath(*folder))

    def read(*words: str) -> PipelineConfig:
        return load(PipelineConfig, "pipeline", ["preset=test", f"storage={tmp_path}", *words])

    return read


@pytest.fixture
def opened(settings: Callable[..., PipelineConfig]) -> Callable[..., Run]:
    """A run with these words, nothing done yet."""

    def open_run(*words: str) -> Run:
        return Run.open(settings(*words), Quiet())

    return open_run


def test_a_run_is_named_by_what_decides_its_numbers(opened: Callable[..., Run]) -> None:
    first = opened().id
    assert opened().id == first
    for word in ("compute.trial_cpus=2", "tracking_uri=http://127.0.0.1:9"):
        assert opened(word).id == first
    others = [
        opened("seeds=2").id,
        opened("shots=5").id,
        opened("imbalance=0.5").id,
        opened("methods.coop.adjust_logits=1").id,
        opened("methods.coop.training.lr=0.5").id,
        opened("target_tpr=0.9").id,
        opened("benchmark.templates=['a {}.']").id,
        opened("embed.exif=apply").id,
    ]
    assert len({first, *others}) == 9


def test_the_resolved_configuration_is_kept_beside_the_run(opened: Callable[..., Run]) -> None:
    found = opened("shots=7")
    text = found.storage.read_bytes("runs", found.id, "config.yaml").decode()
    assert "shots: 7" in text
    assert "name: digits" in text


def test_a_long_tail_reaches_the_training_set_and_the_method(opened: Callable[..., Run]) -> None:
    found = opened("shots=16", "imbalance=0.1", "methods.coop.adjust_logits=1")
    labels = found.benchmark.sets["train"].labels
    # 16 x 0.1^(i / 5), rounded down
    assert [labels.count(k) for k in range(6)] == [16, 10, 6, 4, 2, 1]
    assert found.config.methods["coop"].adjust_logits == 1
    assert found.config.methods["ebm"].adjust_logits == 0


@pytest.mark.parametrize("stage", ["evaluate", "register"])
def test_a_stage_alone_asks_for_what_comes_before_it(
    settings: Callable[..., PipelineConfig], stage: str
) -> None:
    with pytest.raises(UserError, match=r"run [0-9a-f]{12} has no \w+ yet: run python -m jobs\."):
        run(settings(), Quiet(), only=stage)
    assert not Run.open(settings(), Quiet()).has(stage)


@pytest.mark.parametrize("needed", ["train", "validation"])
def test_a_benchmark_without_training_or_validation_images(
    settings: Callable[..., PipelineConfig], needed: str
) -> None:
    config = settings()
    left = {name: chosen for name, chosen in config.benchmark.sets.items() if name != needed}
    benchmark = config.benchmark.model_copy(update={"sets": left})
    with pytest.raises(UserError, match=f"benchmark 'digits' has no set '{needed}'"):
        run(config.model_copy(update={"benchmark": benchmark}), Quiet())


@pytest.mark.slow
def test_the_training_of_the_backbone_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Mock()
    monkeypatch.setattr(mini, "STEPS", 40)
    words = ["preset=test", f"storage={tmp_path}"]
    Run.open(load(PipelineConfig, "pipeline", words), observer)
    assert [(name, *given[:2]) for name, given, _ in observer.mock_calls] == [
        ("started", "backbone", 1),
        ("progress", 20, 40),
        ("finished", "backbone", ANY),
    ]
