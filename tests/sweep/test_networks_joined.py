"""The sweep's result with the settings and trials of networks beside those of heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from pipelines.methods import METHODS
from pipelines.pipeline import network_sweep
from pipelines.sweep.result import Choice
from tests.sweep.network_toy import network
from tests.sweep_record import SURFACE, choice, result, surface, trial

SCORES: Any = {"mcm": {"tau": 2.0}}


def test_heads_keep_their_choice_and_networks_take_that_of_their_own_trials() -> None:
    of_head = [trial("coop", n, {"training.lr": lr}, 0.9) for n, lr in enumerate((0.1, 0.2))]
    head = choice(of_head[1], "mcm", SCORES, training={"lr": 0.2})
    own = trial("tuned", 0, {}, 0.8)
    classifier = METHODS["classifier"].Config(score="mcm")
    after = Choice(setting=classifier, trial=0, scores=SCORES, validation=own.scores, accuracy=0.7)
    other = after.model_copy(update={"setting": classifier})
    swept = result(
        {"tuned": after, "coop": head, "plain": other},
        [own, *of_head, own.model_copy(update={"method": "plain"})],
    )
    table = pa.Table.from_pylist([*surface("tuned", 0), *surface("coop", 1)], SURFACE)

    of_network = [trial("tuned", n, {"weight": w}, 0.9) for n, w in enumerate((0.1, 0.2, 0.3))]
    chosen = network(weight=0.3)
    best = Choice(setting=chosen, chosen={"weight": 0.3}, trial=2, scores={})
    run: Any = SimpleNamespace(
        trained=SimpleNamespace(swept=result({"tuned": best}, of_network)),
        settings={"tuned": chosen, "coop": METHODS["coop"].Config(), "plain": network()},
        frozen={"coop": METHODS["coop"].Config()},
    )
    found, rows = network_sweep.joined(run, swept, table)
    assert list(found.methods) == ["tuned", "coop", "plain"]
    assert found.methods["coop"] == head
    tuned = found.methods["tuned"]
    assert (tuned.setting, tuned.chosen, tuned.trial) == (chosen, {"weight": 0.3}, 2)
    assert (tuned.scores, tuned.validation, tuned.accuracy) == (SCORES, own.scores, 0.7)
    plain = found.methods["plain"]
    assert (plain.setting, plain.chosen, plain.trial) == (network(), {}, 0)
    assert found.of("tuned") == of_network
    assert found.of("coop") == of_head
    assert len(found.of("plain")) == 1
    assert rows is not None
    assert {(r["method"], r["trial"]) for r in rows.to_pylist()} == {("tuned", 2), ("coop", 1)}
    assert rows.drop_columns("trial") == table.drop_columns("trial")


def test_without_a_search_networks_keep_the_trial_of_the_sweep() -> None:
    own = trial("tuned", 0, {}, 0.8)
    classifier = METHODS["classifier"].Config(score="mcm")
    swept = result({"tuned": Choice(setting=classifier, trial=0, scores=SCORES)}, [own])
    run: Any = SimpleNamespace(
        trained=SimpleNamespace(swept=None), settings={"tuned": network()}, frozen={}
    )
    found, rows = network_sweep.joined(run, swept, None)
    assert found.methods["tuned"].setting == network()
    assert found.trials == (own,)
    assert rows is None
