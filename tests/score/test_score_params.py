"""`score_params`: a score's parameters in a method's config, where nothing is searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.backbones.description import BackboneConfig
from pipelines.config import ConfigError, UserError, load, plain
from pipelines.finetune import cache as trained_heads
from pipelines.finetune.loop import TrainingData, TrainingJob
from pipelines.methods import METHODS
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.score import search as posthoc
from pipelines.settings.config import PipelineConfig, words_again
from pipelines.sweep import record as sweep_record
from pipelines.sweep.result import Choice

coop = METHODS["coop"].Config


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"mmc": {"tau": 1}}, "score_params: no score 'mmc'; allowed: msp, "),
        ({"mcm": {"tua": 1}}, "score_params.mcm: no parameter 'tua'; allowed: tau"),
        ({"max_logit": {"tau": 1}}, "no parameter 'tau'; allowed: none, it has no parameters"),
        ({"energy+knn": {"k": 5}}, "no parameter 'k'; allowed: energy.tau, knn.k"),
    ],
)
def test_unknown_names_are_refused_with_what_is_allowed(params: Any, problem: str) -> None:
    (found,) = posthoc.params_problems(coop(score_params=params))
    assert problem in found
    words = ["methods=[coop]", f"methods.coop.score_params={params}"]
    with pytest.raises(ConfigError) as caught:
        load(PipelineConfig, "pipeline", words)
    (line,) = caught.value.problems
    assert line.startswith("methods: coop.score_params")
    assert problem in line


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"mcm": {"tau": 0}}, "score_params.mcm: tau must be"),
        ({"delta_energy": {"c": 9}}, "score_params.delta_energy: "),
        ({"knn": {"k": 40}}, "score_params.knn: k=40: allowed: 1 to 30"),
        ({"energy+knn": {"knn.k": 0}}, "score_params.energy+knn: k=0: allowed: 1 to 30"),
    ],
)
def test_impossible_values_are_refused_for_the_benchmark(params: Any, problem: str) -> None:
    (found,) = posthoc.params_problems(coop(score_params=params), num_classes=8, num_train=30)
    assert found.startswith(problem)


def test_they_are_said_before_any_work(tmp_path: Path) -> None:
    words = ["methods=[coop]", "methods.coop.score_params={mcm: {tau: -1}}", f"storage={tmp_path}"]
    with pytest.raises(UserError, match=r"^methods\.coop\.score_params\.mcm: tau must be"):
        Run.open(load(PipelineConfig, "pipeline", words), Quiet())
    assert list(tmp_path.iterdir()) == []


def test_they_stand_in_for_the_defaults_as_they_are() -> None:
    method = coop(score_params={"delta_energy": {"tau": 0.25}, "energy+knn": {"knn.k": 3}})
    found = posthoc.method_defaults(
        method, ["max_logit", "delta_energy", "energy+knn"], num_train=30
    )
    assert found == {
        "max_logit": {},
        "delta_energy": {"tau": 0.25},
        "energy+knn": {"knn.k": 3},
    }
    assert posthoc.method_defaults(coop(), ["knn"], num_train=30) == {"knn": {"k": 30}}
    none = coop(score_params={"knn": {}, "energy+knn": {"energy.tau": 2.0}})
    assert posthoc.method_defaults(none, ["knn", "energy+knn"], num_train=30) == {
        "knn": {"k": 30},
        "energy+knn": {"knn.k": 30, "energy.tau": 2.0},
    }


def test_a_trained_head_is_found_again_whatever_they_are(
    backbone_files: dict[str, tuple[Path, Path]],
) -> None:
    config, path = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(config), path=str(path))
    features, labels = np.zeros((2, 16), np.float32), np.array([0, 1])
    data = TrainingData(("a", "b"), ("{}",), features, labels, features, labels, None, "address")

    def address(**changes: Any) -> str:
        return trained_heads.address(TrainingJob(coop(**changes), seed=0), data, backbone)

    assert address(score_params={"mcm": {"tau": 0.5}}) == address()
    assert address(training={"lr": 0.5}) != address()


def test_the_winning_yaml_is_the_setting_to_the_last_digit(tmp_path: Path) -> None:
    taus = {"mcm": {"tau": 0.1 + 0.2}, "delta_energy": {"tau": 1e-5 / 3, "c": 2}, "max_logit": {}}
    setting = coop(training={"lr": 1 / 3, "epochs": 7})
    config = load(PipelineConfig, "pipeline", ["methods=[coop]", "shots=4", "seeds=2"])
    text = sweep_record.best_yaml("coop", Choice(setting=setting, scores=taus), words_again(config))
    file = tmp_path / "coop.yaml"
    file.write_text(text)
    again = load(PipelineConfig, "pipeline", [f"methods=@{file}", "sweep=none"])
    (method,) = again.methods.values()
    assert list(again.methods) == ["coop"]
    assert method == coop(
        **{**plain(setting), "score_params": {k: v for k, v in taus.items() if v}}
    )
    assert isinstance(method.score_params["delta_energy"]["c"], int)
    assert "benchmark=digits backbone=mini" in text.splitlines()[1]
    assert "seeds=2 shots=4 target_tpr=0.95" in text.splitlines()[1]
    assert "threshold" not in text
    promised = load(PipelineConfig, "pipeline", ["methods=[coop]", "threshold.rule=conformal"])
    assert words_again(promised).endswith(" threshold.rule=conformal")
