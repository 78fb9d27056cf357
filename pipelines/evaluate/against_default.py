"""What the sweep brought: each method's chosen setting against its default one, on test images.

The default setting of a method is its section of the configuration as it stands, its scores with
`score_params` or their own defaults. Where the chosen setting trains otherwise, `finetune` trains
the default one too, for the first `SEEDS` seeds, as METHOD@default-SEED; else the two share the
head and only the scores' parameters differ. `evaluate` opens the test tables of both, once.
Nothing else reads the default heads: no other table, no choice and no registration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.evaluate.stage import FIGURES, EvaluateConfig, Scored, groups, paired
from pipelines.methods import MethodConfig, training_setting
from pipelines.methods.base import NOT_TRAINED
from pipelines.ood import METRICS
from pipelines.score import search as posthoc

MARK = "@default"
# Seeds whose default heads are trained: each costs a training of every compared method.
SEEDS = 1


@dataclass(frozen=True)
class Default:
    """A method as configured: what the sweep's choice is compared with.

    Attributes:
        method: the setting.
        scores: the parameters of every score.
        trains: whether the chosen setting trains another head than this one.
        own: by score, the values that it takes for parameters which are left out.
    """

    method: MethodConfig
    scores: Mapping[str, Mapping[str, float]]
    trains: bool
    own: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def params(self, score: str, chosen: Mapping[str, float]) -> dict[str, float]:
        """The score's parameters, without those that nobody set."""
        own = self.own.get(score, {})
        return {
            key: value
            for key, value in self.scores[score].items()
            if key in chosen or own.get(key) != value
        }

    def is_same(self, score: str, chosen: Mapping[str, float]) -> bool:
        """Whether the chosen parameters are these, whatever is left out."""
        own = dict(self.own.get(score, {}))
        return own | dict(self.scores[score]) == own | dict(chosen)


def defaults(
    methods: Mapping[str, MethodConfig],
    chosen: Mapping[str, Any],
    scores: Sequence[str],
    *,
    num_train: int,
) -> dict[str, Default]:
    """The default of every method whose chosen setting, or a score's parameters, differ from it.

    Args:
        methods: of the run, as configured, by name.
        chosen: `methods` of `sweep.json`.
        scores: names.
        num_train: training images, which bound knn's default k.
    """
    found = {}
    for name, method in methods.items():
        setting = {k: v for k, v in chosen[name]["setting"].items() if k not in NOT_TRAINED}
        params = posthoc.method_defaults(method, scores, num_train=num_train)
        trains = setting != training_setting(method)
        own = {score: posthoc.defaults(score, num_train=num_train) for score in scores}
        default = Default(method, params, trains, own)
        known = {score: chosen[name]["scores"].get(score, p) for score, p in params.items()}
        if trains or not all(default.is_same(score, p) for score, p in known.items()):
            found[name] = default
    return found


def head_name(method: str) -> str:
    """What the default heads of a method are called in score files and in MLflow."""
    return f"{method}{MARK}"


def rows(
    best: Mapping[tuple[str, int], Scored],
    default: Mapping[tuple[str, int], Scored],
    chosen: Mapping[str, Any],
    of: Mapping[str, Default],
    settings: EvaluateConfig,
) -> list[dict[str, Any]]:
    """The content of `best_against_default` in `metrics.json`.

    All OOD images are pooled (in the main table, groups are means over sets); FPR is at 95 % TPR
    on ID test, as in every paired interval. A score that the choice left as it was, head and
    parameters, has no row.

    Args:
        best: scores by (method, seed) under the chosen setting.
        default: the same under the default setting, for the seeds that have it.
        chosen: `methods` of `sweep.json`.
        of: what `defaults` found.
        settings: the bootstrap.
    """
    found = []
    for name, standing in of.items():
        seeds = sorted(seed for method, seed in default if method == name)
        pairs = [(best[name, seed], default[name, seed]) for seed in seeds]
        if not pairs or not groups(list(pairs[0][0].sets))["mean"]:
            continue
        for score, params in chosen[name]["scores"].items():
            known = all(f"score_{score}" in head.table.column_names for p in pairs for head in p)
            if not known or (standing.is_same(score, params) and not standing.trains):
                continue
            found.append(
                {
                    "method": name,
                    "score": score,
                    "own": standing.method.score == score,
                    "seeds": seeds,
                    "default_setting": _changed(standing.method, chosen[name]),
                    "chosen_setting": dict(chosen[name]["chosen"]),
                    "default_params": standing.params(score, params),
                    "chosen_params": dict(params),
                    **_figures(score, pairs, settings),
                }
            )
    return found


def _changed(method: MethodConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The default values of the settings that the sweep chose."""
    values = {}
    for key in chosen["chosen"]:
        node: Any = training_setting(method)
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        values[key] = node
    return values


def _figures(
    score: str, pairs: Sequence[tuple[Scored, Scored]], settings: EvaluateConfig
) -> dict[str, Any]:
    """AUROC and FPR of both, means over seeds, and their difference with its 95 % interval."""
    names = groups(list(pairs[0][0].sets))["mean"]
    sides = [
        [(head.scores(score, "test"), head.scores(score, *names)) for head in side]
        for side in zip(*pairs, strict=True)
    ]
    found: dict[str, Any] = {}
    for metric in ("auroc", "fpr"):
        of_best, of_default = (
            float(np.mean([METRICS[FIGURES[metric]](*pair) for pair in side])) for side in sides
        )
        found[metric] = {
            "default": of_default,
            "chosen": of_best,
            **paired(metric, sides[0], sides[1], settings),
        }
    return found
