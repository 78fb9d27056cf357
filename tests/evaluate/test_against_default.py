"""The chosen settings against the default ones: which are compared, and the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from pipelines.evaluate import against_default
from pipelines.evaluate.against_default import DefaultSetting, default_settings
from pipelines.evaluate.metrics import DefaultComparison
from pipelines.evaluate.scored import Scored
from pipelines.finetune.loop import TrainingJob
from pipelines.methods import METHODS, MethodConfig
from pipelines.records import HeadKey

SETS = {"validation": 40, "test": 90, "validation_ood/v": 30, "ood/near/p": 50, "ood/far/q": 20}
SCORES = ["max_logit", "mcm", "delta_energy"]
NUM_RESAMPLES = 200


@dataclass(frozen=True)
class Chosen:
    """What validation chose of a method."""

    setting: MethodConfig
    chosen: dict[str, Any]
    scores: dict[str, dict[str, float]]


def ebm(**changes: Any) -> MethodConfig:
    config: MethodConfig = METHODS["ebm"].Config(**changes)
    return config


def chosen(setting: MethodConfig, **params: dict[str, float]) -> Chosen:
    defaults = {"max_logit": {}, "mcm": {"tau": 1.0}, "delta_energy": {"tau": 1.0, "c": 1}}
    weight = setting.weight  # type: ignore[attr-defined]
    return Chosen(setting, {"weight": weight}, {**defaults, **params})


def key(seed: int, variant: str = "chosen", method: str = "ebm") -> HeadKey:
    return HeadKey(method=method, seed=seed, variant=variant)  # type: ignore[arg-type]


class TestWhatIsCompared:
    def test_nothing_where_the_default_was_chosen(self) -> None:
        found = default_settings({"ebm": ebm()}, {"ebm": chosen(ebm())}, SCORES, num_train=9)
        assert found == {}

    def test_other_parameters_share_the_head_and_another_setting_has_its_own(self) -> None:
        other = {"a": chosen(ebm(), mcm={"tau": 0.5}), "b": chosen(ebm(weight=2.0))}
        found = default_settings({"a": ebm(), "b": ebm()}, other, SCORES, num_train=9)
        assert {name: default.trains for name, default in found.items()} == {"a": False, "b": True}
        assert found["b"].method == ebm()
        assert found["a"].scores == {
            "max_logit": {},
            "mcm": {"tau": 1.0},
            "delta_energy": {"tau": 1.0, "c": 1, "low": 0.0},
        }

    def test_the_default_has_its_own_score_params(self) -> None:
        given = ebm(score_params={"mcm": {"tau": 0.5}})
        same = {"ebm": chosen(ebm(), mcm={"tau": 0.5})}  # the record of a trial has none
        assert default_settings({"ebm": given}, same, SCORES, num_train=9) == {}
        (found,) = default_settings(
            {"ebm": given}, {"ebm": chosen(ebm())}, SCORES, num_train=9
        ).values()
        assert (found.scores["mcm"], found.trains) == ({"tau": 0.5}, False)


class TestHeads:
    DEFAULTS: ClassVar = {
        "same": DefaultSetting(ebm(), {}, trains=False),
        "other": DefaultSetting(ebm(weight=3.0), {}, trains=True),
    }

    def test_the_first_seed_is_trained_where_the_choice_trains_another_head(self) -> None:
        found = against_default.trainings(self.DEFAULTS, num_seeds=3)
        assert found == {key(0, "default", "other"): TrainingJob(ebm(weight=3.0), 0)}

    def test_a_default_head_is_its_own_or_the_chosen_one(self) -> None:
        addresses = {
            key(0, method="same"): "a",
            key(1, method="same"): "b",
            key(0, method="other"): "c",
            key(0, "default", "other"): "d",
        }
        assert against_default.default_heads(self.DEFAULTS, addresses) == {
            key(0, "default", "same"): "a",
            key(0, "default", "other"): "d",
        }

    def test_a_score_applies_where_its_record_and_its_inputs_are_there(self) -> None:
        params = {"mcm": {"tau": 1.0}, "knn": {"k": 5}, "vim": {}}
        assert list(against_default.applicable("coop", params, ["knn"])) == ["mcm", "knn"]


def head(seed: int, shift: float) -> Scored:
    """One head's table; every score is ID around 2 + shift against OOD around 0, with ties."""
    random = np.random.default_rng(seed)
    names = [name for name, size in SETS.items() for _ in range(size)]
    mean = np.where([n.startswith(("ood", "validation_ood")) for n in names], 0.0, 2.0 + shift)
    noise = random.normal(size=len(names))  # the images' own: both heads see the same
    columns = {f"score_{s}": np.round(mean + noise + 0.1 * i, 1) for i, s in enumerate(SCORES)}
    zeros = np.zeros(len(names), dtype=np.int64)
    return Scored(pa.table({"set": names, "label": zeros, "predicted": zeros, **columns}))


def sides(scored: Scored, score: str) -> tuple[np.ndarray, np.ndarray]:
    names = np.array(scored.table["set"].to_pylist())
    values = scored.table[f"score_{score}"].to_numpy()
    return values[names == "test"], values[np.char.startswith(names, "ood/")]


def auroc(scored: Scored, score: str) -> float:
    known, other = sides(scored, score)
    truth = np.r_[np.ones(len(known)), np.zeros(len(other))]
    return float(roc_auc_score(truth, np.r_[known, other]))


def fpr(scored: Scored, score: str) -> float:
    known, other = sides(scored, score)
    truth = np.r_[np.ones(len(known)), np.zeros(len(other))]
    false, true, _ = roc_curve(truth, np.r_[known, other], drop_intermediate=False)
    return float(false[np.argmax(true >= 0.95)])


@pytest.fixture(scope="module")
def heads() -> dict[HeadKey, Scored]:
    best = {key(seed): head(seed, 0.8) for seed in (0, 1)}
    return {**best, **{key(seed, "default"): head(seed, 0.0) for seed in (0, 1)}}


def compared(
    heads: dict[HeadKey, Scored], record: Chosen, of: dict[str, DefaultSetting] | None = None
) -> tuple[DefaultComparison, ...]:
    of = of or default_settings({"ebm": ebm()}, {"ebm": record}, SCORES, num_train=9)
    return against_default.compare(heads, {"ebm": record}, of, num_resamples=NUM_RESAMPLES)


def test_rows_have_both_and_the_difference_over_the_pooled_images(
    heads: dict[HeadKey, Scored],
) -> None:
    rows = compared(heads, chosen(ebm(weight=2.0), mcm={"tau": 0.3}))
    assert [(row.score, row.is_criterion, row.seeds) for row in rows] == [
        ("max_logit", False, (0, 1)),
        ("mcm", False, (0, 1)),
        ("delta_energy", True, (0, 1)),
    ]
    for row in rows:
        assert (row.default_setting, row.chosen_setting) == ({"weight": 1.0}, {"weight": 2.0})
        for entry, figure in ((row.auroc, auroc), (row.fpr, fpr)):
            best, default = (
                np.mean([figure(heads[key(seed, variant)], row.score) for seed in (0, 1)])
                for variant in ("chosen", "default")
            )
            assert entry.chosen == pytest.approx(best)
            assert entry.default == pytest.approx(default)
            assert entry.difference.value == pytest.approx(best - default)
            assert entry.difference.low < entry.difference.value < entry.difference.high
    assert rows[1].default_params == {"tau": 1.0}
    assert rows[2].default_params == {"tau": 1.0, "c": 1}  # `low` was not searched
    assert rows[1].chosen_params == {"tau": 0.3}
    assert rows[0].auroc.difference.low > 0  # less overlap, and the images are the same


def test_a_score_that_stayed_as_it_was_has_no_row(heads: dict[HeadKey, Scored]) -> None:
    rows = compared(heads, chosen(ebm(), mcm={"tau": 0.3}))
    assert [row.score for row in rows] == ["mcm"]


def test_only_seeds_with_a_default_head_and_sets_with_ood_count(
    heads: dict[HeadKey, Scored],
) -> None:
    record = chosen(ebm(weight=2.0))
    of = {"ebm": DefaultSetting(ebm(), {"mcm": {"tau": 1.0}}, trains=True)}
    few = {
        place: Scored(scored.table.drop_columns(["score_max_logit", "score_delta_energy"]))
        for place, scored in heads.items()
        if place != key(1, "default")
    }
    (row,) = compared(few, record, of)
    assert (row.score, row.seeds) == ("mcm", (0,))
    assert row.auroc.chosen == pytest.approx(auroc(few[key(0)], "mcm"))

    def without(scored: Scored) -> Scored:
        keep = [not name.startswith("ood/") for name in scored.table["set"].to_pylist()]
        return Scored(scored.table.filter(keep))

    bare = {place: without(scored) for place, scored in few.items()}
    assert compared(bare, record, of) == ()
