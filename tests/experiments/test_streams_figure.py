"""The streams of docs/local.md: how they are drawn, and what is said of made-up features."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.config import UserError
from pipelines.experiments import streams
from pipelines.experiments.streams import Data, confident, measure, stream, tables


@pytest.mark.parametrize(
    ("ratio", "counts"), [((1, 1), (60, 60)), ((10, 1), (100, 10)), ((1, 10), (6, 60))]
)
def test_a_stream_takes_what_both_sides_have(
    ratio: tuple[int, int], counts: tuple[int, int]
) -> None:
    places, is_known = stream(105, 60, ratio, seed=0)
    assert (is_known.sum(), (~is_known).sum()) == counts
    assert len(set(places.tolist())) == len(places)
    assert np.array_equal(is_known, places < 105)
    assert not np.array_equal(places, stream(105, 60, ratio, seed=1)[0])
    assert np.array_equal(places, stream(105, 60, ratio, seed=0)[0])
    assert np.diff(is_known).sum() > min(counts) / 2  # the sides alternate


def test_an_id_only_stream_is_all_of_them() -> None:
    places, is_known = stream(7, 60, (1, 0), seed=3)
    assert sorted(places.tolist()) == list(range(7))
    assert is_known.all()


def near(axis: int, count: int, seed: int) -> Tensor:
    noise = 0.1 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(torch.eye(8)[axis] + noise, dim=1)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Data:
    """Classes 0 and 1; OOD images lie near word 5 of 2 .. 7."""
    monkeypatch.setattr(streams, "PLACES", (("neg_label", 256), ("ada_neg", 16), ("tanl", 16)))
    return Data(
        validation=torch.cat([near(0, 20, 0), near(1, 20, 1)]),
        known=torch.cat([near(0, 30, 2), near(1, 30, 3)]),
        unknown=near(5, 40, 4),
        classes=torch.eye(8)[:2],
        mined=torch.eye(8)[2:],
        corpus=torch.eye(8)[2:],
    )


def test_every_score_by_every_ratio(data: Data) -> None:
    found = measure(data, 0.95)
    assert set(found) == {(*place, ratio) for place in streams.PLACES for ratio in streams.RATIOS}
    for (_, _, ratio), figures in found.items():
        assert all(len(values) == streams.NUM_ORDERS for values in figures.values())
        assert max(figures["rejected"]) <= 40
        if ratio == "ID only":
            assert np.isnan(figures["auroc"]).all()
        else:
            assert figures["auroc"] == pytest.approx([100.0] * streams.NUM_ORDERS)
            assert figures["accepted"] == [0.0] * streams.NUM_ORDERS
    # 38 of 40 validation images are accepted, whatever their order.
    assert len(set(found["neg_label", 256, "ID only"]["rejected"])) == 1
    # Words alone in their group cannot say that an image is near the word of another one.
    shares = re.findall(r"[\d.]+(?= %)", confident(data))
    assert shares[:2] == ["100.0", "0.0"]
    assert float(shares[2]) + float(shares[3]) < 100


def figures(auroc: float, rejected: float) -> dict[str, list[float]]:
    def three(value: float) -> list[float]:
        return [value - 1, value, value + 1]

    return {"auroc": three(auroc), "fpr": three(10), "rejected": three(rejected),
            "accepted": three(20)}  # fmt: skip


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PLACES", (("neg_label", 256), ("ada_neg", 16)))
    found = {
        (*place, ratio): figures(auroc, 5)
        for place, auroc in ((("neg_label", 256), 80.0), (("ada_neg", 16), 78.5))
        for ratio in streams.RATIOS
    }
    for place in streams.PLACES:
        nothing = [float("nan")] * 3
        found[*place, "ID only"] |= {"auroc": nothing, "fpr": nothing, "accepted": nothing}
    _, first, _, gain, _, thresholds = tables(found)
    both = "80.0 (1.0), 10.0 (1.0)"
    assert first.splitlines()[2] == f"| `neg_label` | 256 | {both} | {both} | {both} |"
    assert gain.splitlines()[2:] == ["| `ada_neg` | 16 | -1.5 (0.0) | -1.5 (0.0) | -1.5 (0.0) |"]
    both = "5.0 (1.0), 20.0 (1.0)"
    assert thresholds.splitlines()[0] == "| score | images a batch | ID only | 1:1 | 10:1 | 1:10 |"
    assert thresholds.splitlines()[3] == (
        f"| `ada_neg` | 16 | 5.0 (1.0) | {both} | {both} | {both} |"
    )


def test_a_run_that_is_missing_is_named_with_its_command(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened:
        def has(self, _stage: str) -> bool:
            return False

    monkeypatch.setattr(streams, "load", lambda *_: None)
    monkeypatch.setattr(streams.Run, "open", lambda *_: Opened())
    with pytest.raises(UserError) as caught:
        streams.run(tmp_path)  # type: ignore[arg-type]
    assert str(caught.value).splitlines()[1:] == ["python -m jobs.pipeline preset=streams"]
