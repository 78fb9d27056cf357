"""What the sweep brought: each method's chosen setting against its default one, on test images.

The default setting of a method is its section of the configuration as it stands, its scores with
`score_params` or their own defaults. Where the chosen setting trains otherwise, `finetune` trains
the default one too, for the first `SEEDS` seeds (`HeadKey.variant` is then "default"); else the two
share the head and only the scores' parameters differ. `evaluate` opens the test tables of both,
once. Nothing else reads the default heads: no other table, no choice and no registration.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipelines.evaluate.metrics import (
    ChosenAgainstDefault,
    DefaultComparison,
    DifferenceMetric,
    SettingValue,
)
from pipelines.evaluate.scored import Scored, paired_difference
from pipelines.finetune.loop import TrainingJob
from pipelines.methods import MethodConfig, training_setting
from pipelines.records import HeadKey, Params
from pipelines.score import by_name as scoring
from pipelines.score import search as posthoc

# Seeds whose default heads are trained: each costs a training of every compared method.
SEEDS = 1


class ChosenSetting(Protocol):
    """What validation chose of one method; `pipelines.sweep.result.Choice` is one."""

    @property
    def setting(self) -> MethodConfig:
        """Every value of the method."""

    @property
    def chosen(self) -> Mapping[str, SettingValue]:
        """The searched values among them, by dotted key."""

    @property
    def scores(self) -> Mapping[str, Params]:
        """The parameters of every score under it."""


@dataclass(frozen=True)
class DefaultSetting:
    """A method as configured: what the sweep's choice is compared with.

    Attributes:
        method: the setting.
        scores: the parameters of every score.
        trains: whether the chosen setting trains another head than this one.
        left_out: by score, the values that it takes for parameters which are left out.
    """

    method: MethodConfig
    scores: Mapping[str, Params]
    trains: bool
    left_out: Mapping[str, Params] = field(default_factory=dict)

    def params(self, score: str, chosen: Params) -> dict[str, float]:
        """The score's parameters, without those that nobody set."""
        left_out = self.left_out.get(score, {})
        return {
            key: value
            for key, value in self.scores[score].items()
            if key in chosen or left_out.get(key) != value
        }

    def is_same(self, score: str, chosen: Params) -> bool:
        """Whether the chosen parameters are these, whatever is left out."""
        left_out = dict(self.left_out.get(score, {}))
        return left_out | dict(self.scores[score]) == left_out | dict(chosen)


def default_settings(
    methods: Mapping[str, MethodConfig],
    choices: Mapping[str, ChosenSetting],
    scores: Sequence[str],
    *,
    num_train: int,
) -> dict[str, DefaultSetting]:
    """The default of every method whose chosen setting, or a score's parameters, differ from it.

    Args:
        methods: of the run, as configured, by name.
        choices: what validation chose, by method.
        scores: names.
        num_train: training images, which bound knn's default k.
    """
    found = {}
    for name, method in methods.items():
        choice = choices[name]
        params = posthoc.method_defaults(method, scores, num_train=num_train)
        trains = training_setting(choice.setting) != training_setting(method)
        left_out = {score: posthoc.defaults(score, num_train=num_train) for score in scores}
        default = DefaultSetting(method, params, trains, left_out)
        known = {score: choice.scores.get(score, p) for score, p in params.items()}
        if trains or not all(default.is_same(score, p) for score, p in known.items()):
            found[name] = default
    return found


def trainings(
    defaults: Mapping[str, DefaultSetting], *, num_seeds: int
) -> dict[HeadKey, TrainingJob]:
    """The training jobs of the default settings that train another head than the chosen ones.

    Args:
        defaults: of `default_settings`.
        num_seeds: of the run; at most `SEEDS` of them are trained.
    """
    return {
        HeadKey(method=name, seed=seed, variant="default"): TrainingJob(default.method, seed)
        for name, default in defaults.items()
        for seed in range(min(SEEDS, num_seeds))
        if default.trains
    }


def default_heads(
    defaults: Mapping[str, DefaultSetting], addresses: Mapping[HeadKey, str]
) -> dict[HeadKey, str]:
    """The address of every default head: its own, or that of the chosen head which it shares.

    Args:
        defaults: of `default_settings`.
        addresses: of the trained heads, those of `trainings` among them.
    """
    found = {}
    for name, default in defaults.items():
        variant = "default" if default.trains else "chosen"
        for key, address in addresses.items():
            if (key.method, key.variant) == (name, variant) and key.seed < SEEDS:
                found[HeadKey(method=name, seed=key.seed, variant="default")] = address
    return found


def applicable(
    head: str, scores: Mapping[str, Params], fitted: Collection[str]
) -> dict[str, Params]:
    """The scores that can judge a head: ViM is left out for a head that is not linear.

    Args:
        head: the name of the head's kind.
        scores: their parameters.
        fitted: names of the records that were fitted for this head.
    """
    return {
        name: params
        for name, params in scores.items()
        if set(scoring.records_read(name)) <= set(fitted) and scoring.applies(name, head)
    }


def compare(
    scored: Mapping[HeadKey, Scored],
    choices: Mapping[str, ChosenSetting],
    defaults: Mapping[str, DefaultSetting],
    *,
    num_resamples: int,
) -> tuple[DefaultComparison, ...]:
    """Every score of every method under the chosen setting against the default one.

    All OOD images are pooled (in the main table, groups are means over sets); FPR is at 95 % TPR
    on ID test, as in every paired interval. A score that the choice left as it was, head and
    parameters, has no row.

    Args:
        scored: of all heads; those of the default settings for the seeds that have them.
        choices: what validation chose, by method.
        defaults: of `default_settings`.
        num_resamples: of the bootstrap.
    """
    found = []
    for name, default in defaults.items():
        keys = [key for key in scored if (key.method, key.variant) == (name, "default")]
        seeds = sorted(key.seed for key in keys)
        pairs = [_both(scored, name, seed) for seed in seeds]
        if not pairs or not pairs[0][0].ood:
            continue
        for score, params in choices[name].scores.items():
            known = all(head.has(score) for pair in pairs for head in pair)
            if not known or (default.is_same(score, params) and not default.trains):
                continue
            found.append(
                DefaultComparison(
                    method=name,
                    score=score,
                    is_criterion=default.method.score == score,
                    seeds=tuple(seeds),
                    default_setting=_searched(default.method, choices[name]),
                    chosen_setting=dict(choices[name].chosen),
                    default_params=default.params(score, params),
                    chosen_params=dict(params),
                    auroc=_figures("auroc", score, pairs, num_resamples),
                    fpr=_figures("fpr", score, pairs, num_resamples),
                )
            )
    return tuple(found)


def _both(scored: Mapping[HeadKey, Scored], method: str, seed: int) -> tuple[Scored, Scored]:
    """The heads of the chosen and of the default setting."""
    default = HeadKey(method=method, seed=seed, variant="default")
    return scored[HeadKey(method=method, seed=seed)], scored[default]


def _searched(method: MethodConfig, choice: ChosenSetting) -> dict[str, SettingValue]:
    """The default values of the settings that the sweep chose."""
    values = {}
    for key in choice.chosen:
        node: Any = training_setting(method)
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        values[key] = node
    return values


def _figures(
    metric: DifferenceMetric,
    score: str,
    pairs: Sequence[tuple[Scored, Scored]],
    num_resamples: int,
) -> ChosenAgainstDefault:
    """A metric of both, means over seeds, and their difference with its 95 % interval."""
    ood = pairs[0][0].ood
    chosen, default = (
        [head.resampled(metric, score, ood, num_resamples) for head in side]
        for side in zip(*pairs, strict=True)
    )
    return ChosenAgainstDefault(
        default=float(np.mean([head.value for head in default])),
        chosen=float(np.mean([head.value for head in chosen])),
        difference=paired_difference(chosen, default),
    )
