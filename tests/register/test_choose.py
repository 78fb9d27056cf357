"""Which method and score are registered: by validation data alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pipelines.config import UserError
from pipelines.methods import METHODS
from pipelines.register.choose import champion
from pipelines.register.config import RegisterConfig

SCORES = ("mcm", "max_logit", "delta_energy")


@dataclass(frozen=True)
class Figures:
    auroc: float
    fpr: float


@dataclass(frozen=True)
class Validated:
    accuracy: float | None = None
    validation: dict[str, Figures] = field(default_factory=dict)


VALIDATED = {
    "zero_shot": Validated(0.90, {"mcm": Figures(0.99, 0.1)}),
    "coop": Validated(0.96, {"mcm": Figures(0.80, 0.5), "delta_energy": Figures(0.85, 0.4)}),
    "ebm": Validated(0.955, {"mcm": Figures(0.85, 0.3), "delta_energy": Figures(0.7, 0.6)}),
}


def chosen(
    choices: dict[str, Validated] = VALIDATED, scores: tuple[str, ...] = SCORES, **wanted: str
) -> tuple[str, str]:
    methods = {name: METHODS[name].Config() for name in choices}
    settings = RegisterConfig(**wanted)
    return champion(methods, scores, choices, settings, accuracy_tolerance=0.01)


def test_best_validation_auroc_then_fpr_among_the_accurate() -> None:
    # zero_shot is more than 0.01 below the best accuracy; of two at 0.85 the lower FPR.
    assert chosen() == ("ebm", "mcm")


def test_a_method_or_a_score_may_be_asked_for() -> None:
    assert chosen(method="coop") == ("coop", "delta_energy")
    assert chosen(method="zero_shot") == ("zero_shot", "mcm")
    assert chosen(score="delta_energy") == ("coop", "delta_energy")


def test_one_that_is_not_in_the_run() -> None:
    with pytest.raises(UserError, match=r"register_as\.method=cocoop: .*allowed: auto, zero_shot"):
        chosen(method="cocoop")
    with pytest.raises(UserError, match=r"register_as\.score=msp: .*allowed: auto, mcm"):
        chosen(score="msp")


def test_where_nothing_was_searched_the_last_methods_selection_criterion() -> None:
    nothing = {name: Validated() for name in ("zero_shot", "coop", "ebm")}
    assert chosen(nothing) == ("ebm", "delta_energy")
    assert chosen(nothing, method="coop") == ("coop", "mcm")
    assert chosen(nothing, score="max_logit") == ("ebm", "max_logit")


def test_a_criterion_that_is_not_in_the_run_gives_way_to_the_first_score_that_applies() -> None:
    assert chosen({"ebm": Validated()}, ("msp", "max_logit")) == ("ebm", "msp")
    # neg_label compares images with text, which a linear probe has none of.
    probe = METHODS["cross_entropy"].Config(head={"name": "linear_probe"}, score="mcm")
    found = champion(
        {"linear_probe": probe}, ("neg_label", "gen"), {"linear_probe": Validated()},
        RegisterConfig(), accuracy_tolerance=0.01,
    )  # fmt: skip
    assert found == ("linear_probe", "gen")
