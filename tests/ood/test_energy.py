import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ood import adjust_logits, free_energy, outlier_counts, prior, suggest_margins
from tests.ood import oracles
from tests.ood.oracles import PROPERTY, assert_close, similarities


@PROPERTY
@given(logits=similarities(), tau=st.sampled_from([0.01, 1.0, 30.0]))
def test_free_energy_is_minus_the_log_partition_function(logits, tau):
    expected = [-oracles.energy(row, tau) for row in logits.tolist()]
    assert_close(free_energy(logits, tau), expected, rtol=1e-12, atol=1e-13 * (1 + tau))


def test_free_energy_is_low_for_a_sample_with_large_logits():
    confident, flat = free_energy(torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert confident < flat


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_free_energy_computes_in_at_least_float32(given_dtype, expected):
    logits = torch.linspace(-3, 3, 12).reshape(3, 4).to(given_dtype)
    result = free_energy(logits)
    assert result.dtype == expected
    assert_close(result, [-oracles.energy(row) for row in logits.tolist()], rtol=1e-6)


# Margins


def test_margins_are_the_mean_energies():
    id_energy = torch.tensor([-9.0, -7.0, -8.0])
    ood_energy = np.array([-3.0, -2.0, -1.0, -4.0])
    assert suggest_margins(id_energy, ood_energy) == (-8.0, -2.5)


def test_inverted_energies_give_ordered_margins_and_a_warning():
    with pytest.warns(
        RuntimeWarning, match=r"energies are inverted: outliers .*\(-8\) than ID samples \(-2\)"
    ):
        margins = suggest_margins(torch.tensor([-2.0]), torch.tensor([-8.0]))
    assert margins == (-8.0, -2.0)


def test_margins_refuse_what_they_cannot_judge():
    energies = torch.tensor([-1.0, -3.0])
    for id_energy, ood_energy, message in (
        (energies, torch.tensor([-2.0]), r"are equal \(-2.0\)"),
        (energies, torch.empty(0), "ood_energy is empty"),
        (torch.empty(0), energies, "id_energy is empty"),
        (torch.tensor([math.nan, 0.0]), energies, "id_energy holds 1 NaN .* row 0"),
        (energies[:, None], energies, "id_energy must have 1 dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            suggest_margins(id_energy, ood_energy)


def test_margins_of_float16_energies_do_not_overflow():
    assert suggest_margins(torch.full((5000,), -60.0).half(), torch.zeros(3).half()) == (-60.0, 0.0)


# Priors


@PROPERTY
@given(logits=similarities(max_rows=12), cut=st.integers(0, 12))
def test_outlier_counts_count_predictions_and_shards_add_up(logits, cut):
    expected = [0] * logits.shape[1]
    for row in logits.tolist():
        expected[row.index(max(row))] += 1
    counts = outlier_counts(logits)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
    assert torch.equal(outlier_counts(logits[:cut]) + outlier_counts(logits[cut:]), counts)


def test_prior_is_the_share_of_each_class():
    shares = prior(torch.tensor([6, 0, 2]))
    assert shares.dtype == torch.float64
    assert shares.tolist() == [0.75, 0.0, 0.25]
    assert prior(np.array([1.5, 0.5])).tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.zeros(3), "at least one > 0"),
        (torch.tensor([1, -1]), "must be >= 0"),
        (torch.tensor([1.0, math.inf]), "holds 1 NaN or infinite"),
        (torch.ones(2, 2), "must have 1 dimension"),
        (torch.empty(0), r"shape \(K,\)"),
    ],
)
def test_prior_refuses_counts_without_a_distribution(counts, message):
    with pytest.raises(ValueError, match=message):
        prior(counts)


def test_adjusted_logits_predict_the_balanced_class():
    logits = torch.tensor([[2.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    class_prior = torch.tensor([0.9, 0.1])
    adjusted = adjust_logits(logits, class_prior, tau=0.5)
    expected = [
        [f - 0.5 * math.log(share) for f, share in zip(row, class_prior.tolist(), strict=True)]
        for row in logits.tolist()
    ]
    assert torch.allclose(adjusted, torch.tensor(expected, dtype=torch.float64), rtol=1e-14)
    # tau = 1: log 9 = 2.2 outweighs the lead of 1 but not the lead of 3
    assert adjust_logits(logits, class_prior).argmax(dim=1).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("logits", "class_prior", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0.5, 0.0, 0.5]), "> 0 for every class, came 0 for cla"),
        (torch.zeros(2, 3), torch.tensor([0.5, 0.5]), r"shape \(3,\), came \(2,\)"),
        (torch.zeros(2, 2), torch.tensor([0.5, -0.5]), "must be >= 0"),
        (torch.tensor([[math.nan, 0.0]]), torch.tensor([0.5, 0.5]), "logits holds 1 NaN"),
    ],
)
def test_adjust_logits_refuses_bad_input(logits, class_prior, message):
    with pytest.raises(ValueError, match=message):
        adjust_logits(logits, class_prior)


def test_read_only_arrays_are_taken_without_a_warning():
    counts = np.array([3, 1])
    counts.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prior(counts).tolist() == [0.75, 0.25]
