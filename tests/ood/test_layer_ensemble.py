"""The ensemble of layers against pytorch-ood's, and what it refuses."""

import numpy as np
import pytest
import torch
from pytorch_ood.detector import MultiMahalanobis

from pipelines.ood.layer_ensemble import LayerEnsemble
from pipelines.ood.records import move, record_from_state, record_state

SIZES = [3, 5, 2]


def problem(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 4
    scale = torch.tensor([1.0] * 3 + [40.0] * 5 + [0.01] * 2, dtype=torch.float64)
    means = torch.randn(4, 10, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(number, 10, generator=generator, dtype=torch.float64)
    return (means[labels] + noise) * scale, labels


def test_it_is_pytorch_oods_with_the_weights_of_the_docstring() -> None:
    train, labels = problem(400, seed=0)
    other, _ = problem(50, seed=1)
    ours = LayerEnsemble.fit(train, labels, SIZES)
    theirs = MultiMahalanobis([torch.nn.Identity()] * 3).to("cpu")

    def parts(rows: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.split(rows.float() / torch.tensor([1.0, 40, 0.01]).repeat_interleave(
            torch.tensor(SIZES)), SIZES, dim=1))  # fmt: skip

    theirs.fit_structured(parts(train), labels)
    alone = []
    for layer in range(3):  # each layer alone: half the distance by a scatter that is not a mean
        theirs.alpha = [float(layer == n) for n in range(3)]
        alone.append(
            [2 * 400 * theirs.predict_structured(parts(rows)).double() for rows in (train, other)]
        )
    deviations = [train_scores.std(correction=0) for train_scores, _ in alone]
    expected = sum(-scores / d / 3 for (_, scores), d in zip(alone, deviations, strict=True))
    torch.testing.assert_close(ours(other), expected, rtol=1e-3, atol=1e-3)


def test_no_layer_outweighs_another_by_its_units() -> None:
    train, labels = problem(400, seed=0)
    other, _ = problem(50, seed=1)
    units = torch.tensor([7.0] * 3 + [0.3] * 5 + [1000.0] * 2, dtype=torch.float64)
    one = LayerEnsemble.fit(train, labels, SIZES)
    two = LayerEnsemble.fit(train * units, labels, SIZES)
    torch.testing.assert_close(one(other), two(other * units))
    assert (one(other) <= 0).all()
    contributions = torch.stack([
        w * m(part) for w, m, part in zip(
            one.weights, one.layers, torch.split(train, SIZES, dim=1), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(
        contributions.std(dim=1, correction=0), torch.full((3,), 1 / 3, dtype=torch.float64)
    )


def test_its_state_gives_the_same_record() -> None:
    train, labels = problem(100, seed=0)
    record = LayerEnsemble.fit(train, labels, SIZES)
    state = record_state(record)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = record_from_state(LayerEnsemble, state)
    assert len(again.layers) == 3
    assert torch.equal(again(train), record(train))
    assert move(record, torch.float32).weights.dtype == torch.float32
    del state["layers.1.gaussians.center"]
    with pytest.raises(ValueError, match="lacks"):
        record_from_state(LayerEnsemble, state)


@pytest.mark.parametrize("sizes", [[], [3, 5], [3, 5, 3], [10, 0]])
def test_sizes_that_are_not_those_of_the_columns_are_refused(sizes: list[int]) -> None:
    train, labels = problem(40, seed=0)
    with pytest.raises(ValueError, match=r"are not the 10 columns given"):
        LayerEnsemble.fit(train, labels, sizes)


def test_arrays_of_numpy_are_taken_too() -> None:
    train, labels = problem(100, seed=0)
    one = LayerEnsemble.fit(train, labels, SIZES)
    two = LayerEnsemble.fit(train.numpy(), labels.numpy(), np.array(SIZES))
    assert torch.equal(one(train), two(train.numpy()))
