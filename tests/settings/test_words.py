"""Wrong words are told without the plug-ins, as the whole configuration would tell them."""

from __future__ import annotations

import pytest

from pipelines.config import ConfigError, load
from pipelines.settings.config import PipelineConfig
from pipelines.settings.words import RunWords, refuse_wrong_words


def problems(words: list[str]) -> list[str]:
    """What the whole configuration says is wrong."""
    with pytest.raises(ConfigError) as caught:
        load(PipelineConfig, "pipeline", words)
    return caught.value.problems


@pytest.mark.parametrize(
    "words",
    [
        ["bakcbone=x"],
        ["backbone=x"],
        ["methods=[coop,embm]"],
        ["methods=all", "scores=all", "seeds=many", "shots=0"],
        ["preset=test", "benchmark.rooot=x"],
        ["sweep.space={coop: {training.lr: []}}", "sweep.posthoc.tau=[2,1]"],
        ["embed.background=blurple", "register_as.alias=a/b", "compare.start=null"],
        ["no-word", "preset=none_such"],
    ],
)
def test_what_plugins_add_nothing_to_is_told_without_them(words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_wrong_words("pipeline", words)
    assert caught.value.problems == problems(words)


@pytest.mark.parametrize(
    ("word", "about"),
    [
        ("methods.ebm.weigth=3", "methods.ebm.weigth"),
        ("methods={ebm: {name: ebm, weigth: 3}}", "methods.ebm.weigth"),
        ("scores=[mcmm]", "scores"),
        ("compare.reference=mcmm", "compare"),
    ],
)
def test_a_word_that_plugins_refuse_is_told_together_with_the_others(word: str, about: str) -> None:
    refuse_wrong_words("pipeline", ["seeds=many", word])
    told = problems(["seeds=many", word])
    assert any(line.startswith("seeds='many'") for line in told)
    assert any(line.startswith(about) for line in told)


def test_every_key_of_a_run_is_known_without_plugins() -> None:
    assert list(RunWords.model_fields) == list(PipelineConfig.model_fields)
    refuse_wrong_words("pipeline", ["methods=all", "scores=all", "preset=test"])


def test_all_scores_of_a_benchmark_with_some_classes_are_those_not_fitted_to_classes() -> None:
    words = ["methods=[classifier]", "backbone=cifar10_resnet20", "scores=all", "sweep=none"]
    every = load(PipelineConfig, "pipeline", words).scores
    some = load(PipelineConfig, "pipeline", [*words, "benchmark.every_class=false"]).scores
    assert set(every) - set(some) == {
        "mahalanobis", "ssd", "relative_mahalanobis", "gaussian_mixture", "perturbed_mahalanobis",
        "layer_mahalanobis",
    }  # fmt: skip
    assert set(some) < set(every)
