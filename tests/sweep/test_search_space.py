"""Search spaces: what is refused, what a grid and a random search try, and margins in order."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config import UserError
from pipelines.methods import METHODS, MethodConfig
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.domains import problem
from pipelines.sweep.space import settings, with_values

EBM: MethodConfig = METHODS["ebm"].Config()
MARGIN: MethodConfig = METHODS["energy_margin"].Config()


def drawn(method: MethodConfig, space: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return settings(method, space, **{"sampler": "random", "num_samples": 50, "seed": 0, **changes})


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        ([], "an empty list"),
        (0.1, "came 0.1; give a list of values or one of choice, uniform"),
        ({"normal": [0, 1]}, "no sampler 'normal'; allowed: choice"),
        ({"uniform": [1]}, r"uniform: expected [from, to] with from < to, came [1]"),
        ({"uniform": [2, 1]}, "from < to, came [2, 1]"),
        ({"uniform": ["a", "b"]}, "came ['a', 'b']"),
        ({"loguniform": [0, 1]}, "loguniform: expected [from, to], both above 0, came [0, 1]"),
        ({"int": [0.5, 2]}, "int: expected [from, to], both included"),
        ({"choice": []}, "choice: expected the values to choose from"),
    ],
)
def test_what_is_refused(domain: Any, said: str) -> None:
    assert said in str(problem(domain))
    with pytest.raises(ValidationError) as caught:
        SweepConfig(space={"ebm": {"keep": domain}}, sampler="random", num_samples=2)
    assert "space.ebm.keep" in str(caught.value)


def test_a_grid_takes_lists_and_drawing_takes_a_number() -> None:
    with pytest.raises(ValidationError, match="a grid needs a list of values; give one, or"):
        SweepConfig(space={"ebm": {"keep": {"uniform": [0.1, 0.9]}}})
    with pytest.raises(ValidationError, match="sampler=optuna: give num_samples"):
        SweepConfig(sampler="optuna")


def test_every_sampler_stays_in_its_range_and_uses_it() -> None:
    space = {
        "keep": {"uniform": [0.2, 0.9]},
        "training.lr": {"loguniform": [1e-4, 1e-1]},
        "training.epochs": {"int": [3, 5]},
        "training.batch_size": {"logint": [4, 64]},
        "scope": {"choice": ["image", "top"]},
        "tau": [0.5, 1.0],
    }
    found = drawn(EBM, space, num_samples=400)
    assert len(found) == 400
    columns = {key: [values[key] for values in found] for key in space}
    assert 0.2 <= min(columns["keep"]) < 0.25
    assert 0.85 < max(columns["keep"]) <= 0.9
    # Log-uniform: a third of the draws in each of three decades.
    for low in (1e-4, 1e-3, 1e-2):
        share = sum(low <= lr < 10 * low for lr in columns["training.lr"]) / 400
        assert share == pytest.approx(1 / 3, abs=0.08)
    assert set(columns["training.epochs"]) == {3, 4, 5}
    assert 4 <= min(columns["training.batch_size"]) <= 5
    assert 56 <= max(columns["training.batch_size"]) <= 64
    below = sum(size < 16 for size in columns["training.batch_size"]) / 400
    assert below == pytest.approx(math.log(15.5 / 4) / math.log(16), abs=0.08)
    assert set(columns["scope"]) == {"image", "top"}
    assert set(columns["tau"]) == {0.5, 1.0}
    for values in found[:20]:
        with_values(EBM, values)


def test_a_seed_gives_the_same_settings_and_another_others() -> None:
    space = {"keep": {"uniform": [0.2, 0.9]}}
    assert drawn(EBM, space) == drawn(EBM, space)
    assert drawn(EBM, space, seed=1) != drawn(EBM, space)
    # More settings begin with the same ones, so that a longer sweep finds those of a shorter.
    assert drawn(EBM, space, num_samples=60)[:50] == drawn(EBM, space)


def test_margins_stay_in_order() -> None:
    grid = {"m_in": [-15, -11, -9], "m_out": [-12, -10]}
    found = drawn(MARGIN, grid, sampler="grid", num_samples=None)
    assert [(v["m_in"], v["m_out"]) for v in found] == [(-15, -12), (-15, -10), (-11, -10)]
    space = {"m_in": {"uniform": [-15, -5]}, "m_out": {"uniform": [-15, -5]}}
    pairs = [(v["m_in"], v["m_out"]) for v in drawn(MARGIN, space, num_samples=100)]
    assert len(pairs) == 100
    assert all(m_in < m_out for m_in, m_out in pairs)


def test_a_space_without_a_usable_setting() -> None:
    with pytest.raises(UserError, match="in no setting is m_in below m_out"):
        drawn(MARGIN, {"m_in": [1], "m_out": [0]}, sampler="grid", num_samples=None)
    with pytest.raises(UserError, match="in no setting is m_in below m_out"):
        drawn(MARGIN, {"m_in": [1], "m_out": [0]}, num_samples=2)


def test_part_of_a_grid_is_drawn_without_repetition() -> None:
    space = {"keep": [0.1, 0.2, 0.3, 0.4], "tau": [1.0, 2.0, 3.0]}
    whole = drawn(EBM, space, sampler="grid", num_samples=None)
    part = drawn(EBM, space, sampler="grid", num_samples=5)
    assert len(whole) == 12
    assert len({tuple(v.values()) for v in part}) == 5
    assert all(v in whole for v in part)


def test_a_key_that_the_method_lacks() -> None:
    with pytest.raises(UserError, match=r"no key 'training\.momentun' in method ebm"):
        drawn(EBM, {"training.momentun": [0.9]})
