"""Activation shaping and its relatives, against pytorch-ood's detectors and plain loops."""

import math

import numpy as np
import pytest
import pytorch_ood.detector as published
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_ood.detector.ash import ash_b, ash_p, ash_s
from pytorch_ood.detector.scale import scale

from pipelines.ood.linear_layer import DICE, FDBD, VRA, AshB, AshP, AshS, NNGuide, ReAct, Scale

ROWS, COLUMNS, CLASSES = 60, 12, 5


def problem(seed):
    """Training and test activations, as after a ReLU, and a linear layer; float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(ROWS + 20, COLUMNS, generator=generator, dtype=torch.float64).relu()
    drawn[:, 0] += 0.1  # no row of zeros
    layer = torch.nn.Linear(COLUMNS, CLASSES).double().requires_grad_(False)
    layer.weight.normal_(generator=generator)
    layer.bias.normal_(generator=generator)
    return drawn[:ROWS], drawn[ROWS:], layer


def energy(rows, layer):
    return np.log(np.exp(rows @ layer.weight.numpy().T + layer.bias.numpy()).sum(axis=1))


seeds = given(st.integers(0, 10_000))
few = settings(deadline=None, max_examples=15)


@few
@seeds
def test_react_equals_pytorch_oods(seed):
    train, test, layer = problem(seed)
    theirs = published.ReAct(None, layer, percentile=0.9)
    theirs.fit_feature_maps(train, torch.zeros(ROWS))
    ours = ReAct.fit(train, layer.weight, layer.bias, percentile=0.9)
    np.testing.assert_allclose(ours(test), -theirs.predict_feature_maps(test), rtol=1e-9)


@few
@seeds
@pytest.mark.parametrize(
    ("kind", "shape"), [(AshP, ash_p), (AshB, ash_b), (AshS, ash_s), (Scale, scale)]
)
def test_shaping_of_single_rows_equals_pytorch_oods(kind, shape, seed):
    _, test, layer = problem(seed)
    shaped = shape(test[:, :, None, None], 0.65)[:, :, 0, 0]
    ours = kind.fit(layer.weight, layer.bias, percentile=0.65)
    np.testing.assert_allclose(ours(test), energy(shaped.numpy(), layer), rtol=1e-9)


@few
@seeds
def test_dice_equals_pytorch_oods(seed):
    train, test, layer = problem(seed)
    theirs = published.DICE(None, layer.weight, layer.bias, p=0.7)
    theirs.fit_features(train, torch.zeros(ROWS))
    ours = DICE.fit(train, layer.weight, layer.bias, sparsity=0.7)
    np.testing.assert_allclose(ours(test), -theirs.predict_features(test), rtol=1e-4, atol=1e-5)


@few
@seeds
def test_nnguide_equals_pytorch_oods(seed):
    train, test, layer = problem(seed)
    theirs = published.NNGuide(None, layer.float(), k=4)
    theirs.fit_features(train, torch.zeros(ROWS))
    ours = NNGuide.fit(train, layer.weight, layer.bias, k=4)
    np.testing.assert_allclose(ours(test), -theirs.predict_features(test.float()), rtol=1e-4)


@few
@seeds
def test_fdbd_equals_pytorch_oods(seed):
    train, test, layer = problem(seed)
    theirs = published.fDBD(None, layer.float())
    theirs.fit_features(train)
    ours = FDBD.fit(train, layer.weight, layer.bias)
    np.testing.assert_allclose(ours(test), -theirs.predict_features(test), rtol=1e-4)


@few
@seeds
def test_vra_equals_a_plain_loop(seed):
    train, test, layer = problem(seed)
    ordered = np.sort(train.numpy().ravel())
    low, high = (
        np.interp(p * (len(ordered) - 1), range(len(ordered)), ordered) for p in (0.6, 0.9)
    )
    shaped = [[0.0 if x < low else min(x, high) for x in row] for row in test.tolist()]
    ours = VRA.fit(train, layer.weight, layer.bias, lower=0.6, upper=0.9)
    np.testing.assert_allclose(ours(test), energy(np.array(shaped), layer), rtol=1e-9)


def test_nothing_shaped_is_the_energy_score():
    _, test, layer = problem(0)
    plain = energy(test.numpy(), layer)
    for record in (
        ReAct.fit(test, layer.weight, layer.bias, percentile=1),
        VRA.fit(test, layer.weight, layer.bias, lower=0, upper=1),
        AshP.fit(layer.weight, layer.bias, percentile=0),
    ):
        np.testing.assert_allclose(record(test), plain, rtol=1e-12)


@pytest.mark.parametrize("kind", [AshP, AshB, AshS, Scale])
def test_a_row_of_zeros_scores_as_the_bias(kind):
    _, _, layer = problem(0)
    score = kind.fit(layer.weight, layer.bias)(torch.zeros(1, COLUMNS))
    assert score.item() == pytest.approx(layer.bias.logsumexp(0).item(), rel=1e-12)


def test_equal_weights_have_no_boundary_between_them():
    train, test, layer = problem(0)
    layer.weight[1] = layer.weight[0]
    scores = FDBD.fit(train, layer.weight, layer.bias)(test)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, w: ReAct.fit(h, w, percentile=1.1), "percentile must lie in 0..1, came 1.1"),
        (lambda h, w: VRA.fit(h, w, lower=0.9, upper=0.5), "lower must not be above upper"),
        (lambda h, w: DICE.fit(h, w, sparsity=-0.1), "sparsity must lie"),
        (lambda h, w: AshS.fit(w, h[0], percentile=1.0), "bias must have shape"),
        (lambda _, w: AshS.fit(w, percentile=1.0), "keeps none of 12"),
        (lambda h, w: NNGuide.fit(h, w, k=0), r"k must lie in 1\.\.60"),
        (lambda h, w: FDBD.fit(h, w[:1]), "one class"),
        (lambda h, w: ReAct.fit(h[:0], w), "activations is empty"),
        (lambda h, w: ReAct.fit(h, w, torch.zeros(2)), r"bias must have shape \(5,\)"),
        (lambda h, w: ReAct.fit(h, w * math.nan), "NaN or infinite"),
    ],
)
def test_what_cannot_be_fitted_is_said(call, message):
    train, _, layer = problem(0)
    with pytest.raises(ValueError, match=message):
        call(train, layer.weight)
