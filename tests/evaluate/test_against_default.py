"""The chosen settings against the default ones: which are compared, and the figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from pipelines.config import plain
from pipelines.evaluate import against_default
from pipelines.evaluate.against_default import Default
from pipelines.evaluate.stage import EvaluateConfig, Scored
from pipelines.methods import METHODS, MethodConfig

SETS = {"validation": 40, "test": 90, "validation_ood/v": 30, "ood/near/p": 50, "ood/far/q": 20}
SCORES = ["max_logit", "mcm", "delta_energy"]
SETTINGS = EvaluateConfig(num_resamples=200)


def ebm(**changes: Any) -> MethodConfig:
    config: MethodConfig = METHODS["ebm"].Config(**changes)
    return config


def chosen(setting: MethodConfig, **params: dict[str, float]) -> dict[str, Any]:
    standing = {"max_logit": {}, "mcm": {"tau": 1.0}, "delta_energy": {"tau": 1.0, "c": 1}}
    weight = setting.weight  # type: ignore[attr-defined]
    return {
        "setting": plain(setting),
        "chosen": {"weight": weight},
        "scores": {**standing, **params},
    }


class TestWhatIsCompared:
    def test_nothing_where_the_default_was_chosen(self) -> None:
        found = against_default.defaults(
            {"ebm": ebm()}, {"ebm": chosen(ebm())}, SCORES, num_train=9
        )
        assert found == {}

    def test_other_parameters_share_the_head_and_another_setting_has_its_own(self) -> None:
        other = {"a": chosen(ebm(), mcm={"tau": 0.5}), "b": chosen(ebm(weight=2.0))}
        found = against_default.defaults({"a": ebm(), "b": ebm()}, other, SCORES, num_train=9)
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
        assert against_default.defaults({"ebm": given}, same, SCORES, num_train=9) == {}
        (found,) = against_default.defaults(
            {"ebm": given}, {"ebm": chosen(ebm())}, SCORES, num_train=9
        ).values()
        assert (found.scores["mcm"], found.trains) == ({"tau": 0.5}, False)


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
def heads() -> tuple[dict[tuple[str, int], Scored], dict[tuple[str, int], Scored]]:
    best = {("ebm", seed): head(seed, 0.8) for seed in (0, 1)}
    return best, {("ebm", seed): head(seed, 0.0) for seed in (0, 1)}


def test_rows_have_both_and_the_difference_over_the_pooled_images(heads: Any) -> None:
    record = {"ebm": chosen(ebm(weight=2.0), mcm={"tau": 0.3})}
    of = against_default.defaults({"ebm": ebm()}, record, SCORES, num_train=9)
    rows = against_default.rows(*heads, record, of, SETTINGS)
    assert [(row["score"], row["own"], row["seeds"]) for row in rows] == [
        ("max_logit", False, [0, 1]),
        ("mcm", False, [0, 1]),
        ("delta_energy", True, [0, 1]),
    ]
    for row in rows:
        assert (row["default_setting"], row["chosen_setting"]) == ({"weight": 1.0}, {"weight": 2.0})
        for metric, figure in (("auroc", auroc), ("fpr", fpr)):
            best, default = (
                np.mean([figure(side[place], row["score"]) for place in side]) for side in heads
            )
            entry = row[metric]
            assert entry["chosen"] == pytest.approx(best)
            assert entry["default"] == pytest.approx(default)
            assert entry["difference"] == pytest.approx(best - default)
            assert entry["low"] < entry["difference"] < entry["high"]
    assert rows[1]["default_params"] == {"tau": 1.0}
    assert rows[2]["default_params"] == {"tau": 1.0, "c": 1}  # `low` was not searched
    assert rows[1]["chosen_params"] == {"tau": 0.3}
    assert rows[0]["auroc"]["low"] > 0  # less overlap, and the images are the same


def test_a_score_that_stayed_as_it_was_has_no_row(heads: Any) -> None:
    record = {"ebm": chosen(ebm(), mcm={"tau": 0.3})}
    of = against_default.defaults({"ebm": ebm()}, record, SCORES, num_train=9)
    rows = against_default.rows(*heads, record, of, SETTINGS)
    assert [row["score"] for row in rows] == ["mcm"]


def test_only_seeds_with_a_default_head_and_sets_with_ood_count(heads: Any) -> None:
    best, default = heads
    record = {"ebm": chosen(ebm(weight=2.0))}
    tables = [{place: Scored(head.table.drop_columns(["score_max_logit", "score_delta_energy"]))
               for place, head in side.items()} for side in heads]  # fmt: skip
    best, default = tables
    of = {"ebm": Default(ebm(), {"mcm": {"tau": 1.0}}, trains=True)}
    (row,) = against_default.rows(best, {("ebm", 0): default["ebm", 0]}, record, of, SETTINGS)
    assert (row["score"], row["seeds"]) == ("mcm", [0])
    assert row["auroc"]["chosen"] == pytest.approx(auroc(best["ebm", 0], "mcm"))

    def without(scored: Scored) -> Scored:
        keep = [not name.startswith("ood/") for name in scored.table["set"].to_pylist()]
        return Scored(scored.table.filter(keep))

    bare = [{place: without(head) for place, head in side.items()} for side in heads]
    assert against_default.rows(bare[0], bare[1], record, of, SETTINGS) == []
