"""Which networks are trained in one start of the workers, and when the stage needs no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines import pipeline
from pipelines.config import load
from pipelines.pipeline import networks, run
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig
from pipelines.train import stage
from pipelines.train.data import NetworkData, NetworkJob
from tests.small_network import short, write_network

FIRST, ENERGY = "network_cross_entropy", "network_energy"
EXPOSURE, BALANCED = "network_outlier_exposure", "network_balanced"
STARTS = {FIRST: "random", ENERGY: FIRST, EXPOSURE: ENERGY, BALANCED: FIRST}
# The method of each loss.
METHODS = {
    "cross_entropy": FIRST,
    "energy_margin": ENERGY,
    "outlier_exposure": EXPOSURE,
    "balanced_energy": BALANCED,
}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A chain of three methods, and balanced energy, which counts the classes of outliers."""
    return [
        write_network(tmp_path), f"methods=[{','.join(STARTS)}]", *short(*STARTS), "shots=2",
        *(f"methods.{name}.head.train.start={start}" for name, start in STARTS.items()),
        f"methods.{FIRST}.training.outlier_batch_size=null", "scores=[energy]",
        "seeds=1", "training=in_process", f"storage={tmp_path}/storage",
    ]  # fmt: skip


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, int]]]:
    """The method and seed of every job, by call of the stage that trains."""
    seen: list[list[tuple[str, int]]] = []
    train = stage.train

    def noted(jobs: list[NetworkJob], data: NetworkData, *given: object, **more: object) -> object:
        seen.append([(METHODS[job.method.name], job.seed) for job in jobs])
        return train(jobs, data, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(networks.train, "train", noted)
    return seen


@contextmanager
def no_ray(_: object) -> Iterator[None]:
    pytest.fail("nothing here needs Ray")
    yield


def test_a_chain_is_trained_in_one_start_and_who_counts_outliers_in_the_next(
    words: list[str],
    rounds: list[list[tuple[str, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "connect", no_ray)
    done = run(load(PipelineConfig, "pipeline", [*words, "sweep=none"]), Quiet(), last="train")
    assert rounds == [[(FIRST, 0), (ENERGY, 0), (EXPOSURE, 0)], [(BALANCED, 0)]]
    assert [ref.key.method for ref in done.trained.networks] == list(STARTS)
    # The same words find what the first run planned.
    rounds.clear()
    again = run(load(PipelineConfig, "pipeline", [*words, "sweep=none"]), Quiet(), last="train")
    assert (rounds, again.trained) == ([], done.trained)


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        (FIRST, [[FIRST], [ENERGY, BALANCED, EXPOSURE]]),
        (ENERGY, [[FIRST], [ENERGY, BALANCED], [EXPOSURE]]),
        (EXPOSURE, [[FIRST, ENERGY], [EXPOSURE, BALANCED]]),
    ],
)
def test_a_searched_method_waits_for_weights_and_its_followers_for_the_search(
    words: list[str], searched: str, expected: list[list[str]]
) -> None:
    space = f"sweep.space.{searched}={{training.lr: [0.001, 0.01]}}"
    config = load(PipelineConfig, "pipeline", [*words, "sweep=posthoc", space])
    opened = Run.open(config, Quiet())
    waiting = {name: method.network for name, method in config.methods.items() if method.network}
    found = []
    while waiting:
        found.append(networks._together(opened, waiting))
        waiting = {name: how for name, how in waiting.items() if name not in found[-1]}
    assert found == expected
