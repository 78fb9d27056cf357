"""The seeds' statements as properties, and counter-examples where a statement does not hold."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipelines.ood import SCORES, delta_energy, free_energy, masked_energy_change, mcm, msp
from tests.ood.oracles import PROPERTY, similarities

ROUNDING = 1e-12
temperatures = st.sampled_from([0.01, 0.1, 0.5, 1.0, 2.0])


def raised_top(similarity, share):
    """The same rows with each top similarity moved up by `share` of its distance to 1."""
    top, index = similarity.max(dim=1, keepdim=True)
    return similarity.scatter(1, index, top + share * (1 - top))


@PROPERTY
@given(data=st.data(), similarity=similarities(min_classes=2))
def test_a_delta_energy_is_at_most_mcm(data, similarity):
    """(a), Theorem 3.3: at low = 0 and s_1 <= tau ln 2, for every sample and every c."""
    least = float(similarity.max()) / math.log(2)
    tau = max(least, 1e-3) * data.draw(st.floats(1.0, 5.0))
    assume(float(similarity.max()) <= tau * math.log(2))
    for c in range(1, similarity.shape[1] + 1):
        assert (delta_energy(similarity, tau, c) <= mcm(similarity, tau) + ROUNDING).all()


def test_a_fails_above_the_temperature_it_asks_for():
    similarity = torch.tensor([[0.9, 0.1, 0.1]], dtype=torch.float64)
    assert 0.3 * math.log(2) < 0.9
    assert delta_energy(similarity, tau=0.3) > mcm(similarity, tau=0.3)


def test_a_says_nothing_at_equal_tpr():
    """Fewer OOD samples pass an equal THRESHOLD; at equal TPR the order may turn."""
    id_row = torch.tensor([[0.30, 0.10, 0.10]], dtype=torch.float64)
    ood_row = torch.tensor([[0.50, 0.35, 0.35]], dtype=torch.float64)  # larger, less distinct
    assert mcm(id_row) > mcm(ood_row)
    assert delta_energy(id_row) < delta_energy(ood_row)
    assert delta_energy(ood_row) <= mcm(ood_row)


@PROPERTY
@given(similarity=similarities(), share=st.floats(0, 1), tau=temperatures)
def test_b_a_larger_top_similarity_never_scores_less(similarity, share, tau):
    """(b), Theorem 3.2 part 1 with the other similarities equal, for every c."""
    raised = raised_top(similarity, share)
    for c in range(1, similarity.shape[1] + 1):
        gain = delta_energy(raised, tau, c) - delta_energy(similarity, tau, c)
        assert (gain >= -ROUNDING / tau).all()


@pytest.mark.parametrize("c", [1, 2, 3])
def test_b_fails_between_arbitrary_samples(c):
    """Theorem 3.2 as printed asks for nothing but the larger top similarity."""
    id_row = torch.tensor([[0.31, 0.30, 0.30, 0.30]], dtype=torch.float64)
    ood_row = torch.tensor([[0.30, 0.05, 0.00, 0.00]], dtype=torch.float64)
    assert id_row.max() > ood_row.max()
    tau = 0.1
    assert delta_energy(id_row, tau, c) < delta_energy(ood_row, tau, c)


@PROPERTY
@given(similarity=similarities(), share=st.floats(0, 1), tau=temperatures)
def test_b2_delta_energy_gains_at_least_what_mcm_gains(similarity, share, tau):
    """(b2), Theorem 3.2 part 2 with the other similarities equal, for c = 1."""
    raised = raised_top(similarity, share)
    gain = delta_energy(raised, tau) - delta_energy(similarity, tau)
    assert (gain >= mcm(raised, tau) - mcm(similarity, tau) - ROUNDING / tau).all()


def test_b2_fails_for_two_re_aligned_classes():
    ood_row = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    id_row = torch.tensor([[0.6, 0.5, 0.0]], dtype=torch.float64)
    tau = 0.1
    gain = float(delta_energy(id_row, tau, 2) - delta_energy(ood_row, tau, 2))
    mcm_gain = float(mcm(id_row, tau) - mcm(ood_row, tau))
    assert 0 < gain < mcm_gain - 0.1


@PROPERTY
@given(
    similarity=similarities(min_classes=2),
    tau=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    low=st.floats(-1, 1),
)
def test_c_closed_form_for_one_class(similarity, tau, low):
    """(c): E1 - E0 = -log(1 - p_1 + e^{low/tau + E0}), E0 = -logsumexp(s / tau)."""
    energy_before = free_energy(similarity / tau)
    closed = -torch.log(1 - msp(similarity, tau) + torch.exp(low / tau + energy_before))
    assert torch.allclose(delta_energy(similarity, tau, 1, low), closed, rtol=1e-9, atol=1e-9)


@PROPERTY
@given(data=st.data(), similarity=similarities(min_classes=2))
def test_d_permuting_classes_changes_no_score(data, similarity):
    order = data.draw(st.permutations(range(similarity.shape[1])))
    for entry in SCORES.values():
        if entry.inputs[1:]:
            continue
        before = entry(**{entry.input: similarity})
        after = entry(**{entry.input: similarity[:, order]})
        assert torch.allclose(before, after, rtol=1e-13, atol=1e-15)


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    keep=st.floats(0.01, 1),
    tau=st.sampled_from([0.05, 0.3, 1.0]),
    width=st.integers(1, 12),
)
def test_bound_lies_below_delta_energy(seed, keep, tau, width):
    """scope = top, s'_y >= 0, low = 0, y the top class: DeltaEnergy(c=1) >= E2 - E0."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (
        torch.nn.functional.normalize(
            torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1
        )
        for n in (16, 5)
    )
    similarity = images @ texts.T
    labels = similarity.argmax(dim=1)
    kept_share = masked_own_similarity(images, texts, labels, keep)
    held = kept_share >= 0
    bound = masked_energy_change(images, texts, labels, tau, keep, "top")
    slack = delta_energy(similarity, tau) - bound
    assert (slack[held] >= -ROUNDING / tau).all()


def masked_own_similarity(images, texts, labels, keep):
    """s'_y: the sum of the largest entries of z * h_y, by sorting."""
    num_kept = max(1, round(keep * images.shape[1]))
    product = (images * texts[labels]).sort(dim=1, descending=True).values
    return product[:, :num_kept].sum(dim=1)


def test_bound_fails_where_the_masked_similarity_is_negative():
    """Why s'_y >= 0 is asked for: all products negative, keep everything but low = 0 is higher."""
    images = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    texts = torch.tensor([[-0.5, 0.0], [-0.9, 0.0]], dtype=torch.float64)
    similarity = images @ texts.T
    bound = masked_energy_change(images, texts, torch.tensor([0]), 0.5, 1.0, "top")
    assert float(bound) == 0.0
    assert float(delta_energy(similarity, 0.5)) < -0.1
