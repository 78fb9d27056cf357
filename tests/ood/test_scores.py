import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ood import (
    SCORES,
    checks,
    combine,
    delta_energy,
    delta_energy_grid,
    energy,
    mcm,
    msp,
)
from tests.ood import oracles
from tests.ood.oracles import PROPERTY, assert_close, similarities

ORACLES = {
    "msp": oracles.msp,
    "max_logit": oracles.max_logit,
    "energy": oracles.energy,
    "neg_entropy": oracles.neg_entropy,
    "gen": oracles.gen,
    "mcm": oracles.msp,
    "gl_mcm": oracles.gl_mcm,
    "neg_label": oracles.neg_label,
    "neg_mcm": oracles.neg_mcm,
    "delta_energy": oracles.delta_energy,
}
# Settings that every score is judged at, beside its defaults.
SETTINGS = {
    "msp": [{"tau": 0.3}],
    "energy": [{"tau": 2.5}, {"tau": 0.01}],
    "neg_entropy": [{"tau": 0.05}],
    "gen": [{"gamma": 0.5, "top_m": 2}, {"top_m": 1}],
    "mcm": [{"tau": 0.01}],
    "gl_mcm": [{"tau": 0.1, "weight": 0.25}],
    "neg_label": [{"tau": 1.0}, {"tau": 0.3, "groups": 2}],
    "neg_mcm": [{"tau": 0.01}],
    "delta_energy": [{"tau": 0.07, "c": 2}, {"c": 3, "low": -0.3}],
}
CASES = [
    pytest.param(name, setting, id=f"{name}-{setting}")
    for name in SCORES
    for setting in [{}, *SETTINGS.get(name, [])]
]
every_score = pytest.mark.parametrize("name", SCORES)
every_case = pytest.mark.parametrize(("name", "setting"), CASES)


def sample_inputs(num_rows, num_classes, *, seed=0, dtype=torch.float64):
    """Random values for every input a score may ask for."""
    generator = torch.Generator().manual_seed(seed)

    def cosines(*shape):
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)

    return {
        "similarity": cosines(num_rows, num_classes),
        "logits": 8 * cosines(num_rows, num_classes),
        "local_similarity": cosines(num_rows, 3, num_classes),
        "negative_similarity": cosines(num_rows, 5),
    }


def oracle(name, inputs, setting):
    own = [inputs[needed].double().tolist() for needed in SCORES[name].inputs]
    return [ORACLES[name](*row, **setting) for row in zip(*own, strict=True)]


def test_every_score_has_an_oracle():
    assert set(ORACLES) == set(SCORES)


@every_case
def test_equals_its_oracle(name, setting):
    inputs = sample_inputs(6, 7)
    scores = SCORES[name](**inputs, **setting)
    assert scores.dtype == torch.float64
    assert_close(scores, oracle(name, inputs, setting), rtol=1e-12)


@every_case
def test_float32_is_close_and_stays_float32(name, setting):
    inputs = sample_inputs(6, 7, dtype=torch.float32)
    scores = SCORES[name](**inputs, **setting)
    # The share of neg_label is float64: it lies too close to 1.
    assert scores.dtype == (torch.float64 if name == "neg_label" else torch.float32)
    assert_close(scores, oracle(name, inputs, setting), rtol=1e-5)


@every_score
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    inputs = sample_inputs(6, 7, dtype=dtype)
    scores = SCORES[name](**inputs)
    assert scores.dtype == (torch.float64 if name == "neg_label" else torch.float32)
    assert_close(scores, oracle(name, inputs, {}), rtol=1e-5)


@PROPERTY
@given(logits=similarities(), scale=st.sampled_from([0.01, 1.0, 10.0, 100.0]))
@pytest.mark.parametrize("name", ["msp", "max_logit", "energy", "neg_entropy", "gen"])
def test_logit_scores_keep_their_digits(name, logits, scale):
    logits = logits * scale
    expected = [ORACLES[name](row) for row in logits.tolist()]
    # energy may pass through zero, where only the absolute error means anything
    assert_close(SCORES[name](logits=logits), expected, rtol=1e-11, atol=1e-13 * (1 + scale))


def test_entropy_and_gen_of_one_dominant_class_keep_relative_accuracy():
    logits = torch.tensor([[0.0, 41.0, 1.0], [0.0, 200.0, -3.0], [37.0, 0.0, 0.0]])
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for name in ("neg_entropy", "gen"):
            expected = [ORACLES[name](row) for row in logits.tolist()]
            atol = 1e-37 if dtype == torch.float32 else 0.0  # float32's smallest numbers
            scores = SCORES[name](logits=logits.to(dtype))
            assert_close(scores, expected, rtol=rtol, atol=atol)


def test_pytorch_ood_agrees():
    detector = pytest.importorskip("pytorch_ood.detector")
    logits = sample_inputs(50, 20)["logits"]
    theirs = {
        "msp": detector.MaxSoftmax.score(logits, t=2.0),
        "max_logit": detector.MaxLogit.score(logits),
        "energy": detector.EnergyBased.score(logits, t=2.0),
        "neg_entropy": detector.Entropy.score(logits),  # clips p at 1e-7
        "gen": detector.GEN.score(logits, gamma=0.1, M=10) * 10,  # a mean; clips p at 1e-7
    }
    settings = {"msp": {"tau": 2.0}, "energy": {"tau": 2.0}, "gen": {"top_m": 10}}
    for name, outlier_score in theirs.items():
        atol = 1e-5 if name == "neg_entropy" else 0.0
        ours = SCORES[name](logits=logits, **settings.get(name, {}))
        assert_close(ours, -outlier_score, rtol=1e-6, atol=atol)


# Invariances, swept over the table


@every_case
def test_permuting_classes_changes_nothing(name, setting):
    inputs = sample_inputs(6, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted = {
        key: value[..., order] if value.shape[-1] == 7 else value for key, value in inputs.items()
    }
    assert_close(SCORES[name](**permuted, **setting), SCORES[name](**inputs, **setting), rtol=1e-13)


@every_case
def test_each_row_is_scored_alone_whatever_the_block(name, setting, monkeypatch):
    inputs = sample_inputs(23, 7)
    whole = SCORES[name](**inputs, **setting)
    rows = [
        SCORES[name](**{key: value[i : i + 1] for key, value in inputs.items()}, **setting)
        for i in range(23)
    ]
    assert_close(whole, torch.cat(rows), rtol=1e-14)
    monkeypatch.setattr(checks, "_CPU_BLOCK", 64)
    assert_close(SCORES[name](**inputs, **setting), whole, rtol=1e-14)


@every_case
def test_higher_for_a_sample_that_stands_out(name, setting):
    def row(top):
        values = torch.tensor([[top, 0.1, 0.1, 0.1]], dtype=torch.float64)
        return {
            "similarity": values,
            "logits": 10 * values,
            "local_similarity": values[:, None],
            "negative_similarity": torch.full((1, 2), 0.1, dtype=torch.float64),
        }

    assert SCORES[name](**row(0.9), **setting) > SCORES[name](**row(0.15), **setting)


@pytest.mark.parametrize("name", ["msp", "neg_entropy", "gen", "mcm"])
def test_softmax_scores_ignore_a_constant(name):
    inputs = sample_inputs(6, 7)
    shifted = {key: value + 3.25 for key, value in inputs.items()}
    assert_close(SCORES[name](**shifted), SCORES[name](**inputs), rtol=1e-12)


@PROPERTY
@given(logits=similarities(), constant=st.floats(-50, 50))
def test_energy_moves_with_a_constant(logits, constant):
    assert_close(energy(logits + constant), energy(logits) + constant, rtol=0, atol=1e-12)


@PROPERTY
@given(logits=similarities())
def test_log_msp_is_max_logit_minus_energy(logits):
    difference = logits.max(dim=1).values - energy(logits)
    assert_close(msp(logits).log(), difference, rtol=0, atol=1e-13)


@every_case
def test_gradients_are_right(name, setting):
    inputs = {key: value[:2] for key, value in sample_inputs(3, 5).items()}
    own = [inputs[needed].requires_grad_() for needed in SCORES[name].inputs]
    assert torch.autograd.gradcheck(lambda *given: SCORES[name].function(*given, **setting), own)
    assert_close(
        SCORES[name](**inputs, **setting).detach(), oracle(name, inputs, setting), rtol=1e-9
    )


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([0.2, 0.2, 0.1, -0.1], id="top two equal"),
        pytest.param([0.2, 0.0, -0.1, -0.3], id="one re-aligned class at low"),
    ],
)
def test_gradient_of_delta_energy_where_its_accurate_form_has_none(values):
    # For c = 2 the score is smooth in both places.
    row = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(delta_energy(row, tau=0.3, c=2).sum(), row)
    step = 1e-6
    for k in range(4):
        moved = row.detach().repeat(2, 1)
        moved[0, k] += step
        moved[1, k] -= step
        up, down = delta_energy(moved, tau=0.3, c=2)
        assert float(gradient[0, k]) == pytest.approx(float((up - down) / (2 * step)), abs=1e-8)


# Extremes


@every_score
def test_no_rows_give_no_scores(name):
    scores = SCORES[name](**sample_inputs(0, 4))
    assert scores.shape == (0,)


@every_case
def test_extreme_rows_stay_finite(name, setting):
    rows = torch.tensor(
        [[1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, -1.0]],
        dtype=torch.float64,
    )
    inputs = {
        "similarity": rows,
        "logits": rows if "tau" in SCORES[name].parameters else 1000 * rows,
        "local_similarity": rows[:, None].repeat(1, 2, 1),
        "negative_similarity": rows[:, :2],
    }
    if "tau" in SCORES[name].parameters:
        setting = {**setting, "tau": 0.001}
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        given_inputs = {key: value.to(dtype) for key, value in inputs.items()}
        scores = SCORES[name](**given_inputs, **setting)
        atol = 1e-37 if dtype == torch.float32 else 1e-300
        assert_close(scores, oracle(name, given_inputs, setting), rtol=rtol, atol=atol)


@every_score
def test_one_class(name):
    inputs = sample_inputs(3, 1)
    assert_close(SCORES[name](**inputs), oracle(name, inputs, {}), rtol=1e-12)


# DeltaEnergy's accuracy


TAUS = [1.0, 0.3, 0.07, 0.01, 1 / 700, 0.001]


def assert_delta_energy_accurate(similarity, tau, c, low, rtol, atol):
    scores = delta_energy(similarity, tau, c, low)
    for score, row in zip(scores.tolist(), similarity.double().tolist(), strict=True):
        terms = oracles.delta_energy_terms(row, tau, c, low)
        # Terms of opposite sign may cancel in the mean: the error is relative to their size.
        size = math.fsum(abs(term) for term in terms) / c
        assert abs(score - math.fsum(terms) / c) <= rtol * size + atol


@PROPERTY
@given(data=st.data(), similarity=similarities(), tau=st.sampled_from(TAUS))
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-300), (torch.float32, 1e-5, 1e-37)]
)
def test_delta_energy_has_its_digits(dtype, rtol, atol, data, similarity, tau):
    c = data.draw(st.integers(1, similarity.shape[1]))
    low = data.draw(st.sampled_from([0.0, -1.0, 0.25, 0.1]))
    assert_delta_energy_accurate(similarity.to(dtype), tau, c, low, rtol, atol)


@pytest.mark.parametrize("tau", [1.0, 0.01])
@pytest.mark.parametrize("c", [1, 2, 1000])
def test_delta_energy_has_its_digits_over_a_thousand_classes(tau, c):
    generator = torch.Generator().manual_seed(3)
    similarity = torch.rand(2, 1000, generator=generator, dtype=torch.float64) * 0.4
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        values = similarity.to(dtype)
        expected = [fast_delta_energy(row, tau, c) for row in values.double().tolist()]
        assert_close(delta_energy(values, tau, c), expected, rtol=rtol)


def fast_delta_energy(row, tau, c):
    """An oracle for long rows: exactly rounded sums of plain exponentials, low = 0."""
    weights = sorted((math.exp(value / tau) for value in row), reverse=True)
    terms = []
    for j in range(c):
        rest = math.fsum(weights[:j] + weights[j + 1 :])
        terms.append(math.log1p((weights[j] - 1) / (1 + rest)))
    return math.fsum(terms) / c


def test_delta_energy_in_float32_does_not_tie():
    # The difference of two logsumexps has a few dozen values here.
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(4000, 1000, generator=generator) * 0.4
    before = torch.logsumexp(similarity, dim=1)
    after = similarity.scatter(1, similarity.argmax(dim=1, keepdim=True), 0.0).logsumexp(dim=1)
    assert (before - after).unique().numel() < 400
    assert delta_energy(similarity).unique().numel() > 3900


@PROPERTY
@given(data=st.data(), similarity=similarities())
def test_grid_equals_separate_calls(data, similarity):
    num_classes = similarity.shape[1]
    cs = data.draw(st.lists(st.integers(1, num_classes), min_size=1, max_size=3))
    taus = data.draw(st.lists(st.sampled_from(TAUS), min_size=1, max_size=3))
    grid = delta_energy_grid(similarity, taus, cs)
    assert grid.shape == (len(taus), len(cs), len(similarity))
    for t, tau in enumerate(taus):
        for i, c in enumerate(cs):
            assert_close(grid[t, i], delta_energy(similarity, tau, c), rtol=1e-12, atol=1e-13)


def test_grid_reduces_each_cell(monkeypatch):
    monkeypatch.setattr(checks, "_CPU_BLOCK", 64)  # several blocks
    similarity = sample_inputs(50, 6, dtype=torch.float32)["similarity"]
    sizes = []

    def mean(scores):
        sizes.append(scores.shape)
        return float(scores.mean())

    cells = delta_energy_grid(similarity, [1.0, 0.1], [1, 3, 6], reduce=mean)
    expected = [[float(delta_energy(similarity, t, c).mean()) for c in (1, 3, 6)] for t in (1, 0.1)]
    assert sizes == [(50,)] * 6
    assert np.allclose(cells, expected, rtol=1e-6, atol=0)


# Refusals


@every_score
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_count_and_row(name, bad):
    for needed in SCORES[name].inputs:
        inputs = sample_inputs(9, 4)
        inputs[needed][5].view(-1)[0] = bad
        inputs[needed][7].view(-1)[-1] = bad
        with pytest.raises(ValueError, match=rf"{needed} holds 2 NaN or infinite .* row 5 "):
            SCORES[name](**inputs)


def test_first_bad_row_is_counted_over_all_blocks(monkeypatch):
    monkeypatch.setattr(checks, "_CPU_BLOCK", 16)
    similarity = torch.zeros(40, 4)
    similarity[33, 2] = math.nan
    similarity[39] = math.inf
    for call in (mcm, delta_energy, lambda s: delta_energy_grid(s, [1.0], [1])):
        with pytest.raises(ValueError, match=r"holds 5 .* row 33 "):
            call(similarity)


def test_huge_finite_logits_are_not_taken_for_infinity():
    logits = torch.full((2, 4), 3e38)
    assert energy(logits).tolist() == logits[:, 0].tolist()


@every_score
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5), ()])
def test_wrong_rank_is_refused(name, shape):
    inputs = dict.fromkeys(SCORES[name].inputs, torch.zeros(shape))
    with pytest.raises(ValueError, match=r"must have [23] dimensions, came shape"):
        SCORES[name](**inputs)


@every_score
def test_no_class_is_refused(name):
    inputs = sample_inputs(3, 0)
    with pytest.raises(ValueError, match="at least one entry"):
        SCORES[name](**inputs)


@every_score
def test_integers_are_refused(name):
    inputs = {key: value.long() for key, value in sample_inputs(3, 2).items()}
    with pytest.raises(ValueError, match=r"must be floating-point, came torch\.int64"):
        SCORES[name](**inputs)


@pytest.mark.parametrize("name", [name for name in SCORES if "tau" in SCORES[name].parameters])
@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_tau_must_be_positive(name, tau):
    with pytest.raises(ValueError, match="tau must be a finite number > 0, came"):
        SCORES[name](**sample_inputs(3, 4), tau=tau)


@pytest.mark.parametrize("c", [0, 5, -1, 1.5])
def test_c_must_lie_in_its_range(c):
    similarity = sample_inputs(3, 4)["similarity"]
    for call in (
        lambda: delta_energy(similarity, c=c),
        lambda: delta_energy_grid(similarity, [1], [c]),
    ):
        with pytest.raises(ValueError, match=r"from 1 to the number of classes \(4\), came"):
            call()


def test_other_parameters_out_of_range():
    inputs = sample_inputs(3, 4)
    for name, setting, message in (
        ("gen", {"gamma": 0.0}, "gamma must be a finite number > 0"),
        ("gen", {"top_m": 0}, "top_m must be >= 1"),
        ("gl_mcm", {"weight": math.nan}, "weight must be finite"),
        ("delta_energy", {"low": math.inf}, "low must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            SCORES[name](**inputs, **setting)
    with pytest.raises(ValueError, match="at least one value each"):
        delta_energy_grid(inputs["similarity"], [], [1])
    with pytest.raises(ValueError, match="4 classes of similarity"):
        SCORES["gl_mcm"](similarity=torch.zeros(3, 4), local_similarity=torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="same number of rows"):
        SCORES["neg_label"](similarity=torch.zeros(3, 4), negative_similarity=torch.zeros(2, 5))
    for groups in (0, 6, 1.5):
        with pytest.raises(ValueError, match=rf"from 1 to .* words \(5\), came {groups}"):
            SCORES["neg_label"](**sample_inputs(3, 4), groups=groups)


def test_groups_of_negative_words_are_judged_on_their_own():
    """Words far above the others leave the share of their own group alone at 0."""
    similarity = torch.tensor([[0.5, 0.1]], dtype=torch.float32)
    negative = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float32)
    share = SCORES["neg_label"](
        similarity=similarity, negative_similarity=negative, tau=0.005, groups=2
    )
    assert float(share) == pytest.approx(0.5, abs=1e-6)


# The table


@every_score
def test_numpy_arrays_are_read_without_being_written(name):
    inputs = sample_inputs(5, 4, dtype=torch.float32)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    copies = {key: value.copy() for key, value in arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    assert torch.equal(SCORES[name](**arrays), SCORES[name](**inputs))
    assert all(np.array_equal(arrays[key], copies[key]) for key in arrays)


@every_score
def test_parameters_name_the_defaults(name):
    inputs = sample_inputs(5, 4)
    assert SCORES[name].required == ()
    defaults = SCORES[name](**inputs, **SCORES[name].parameters)
    assert torch.equal(SCORES[name](**inputs), defaults)


def test_table_refuses_what_it_does_not_know():
    similarity = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="mcm has no parameter c; it has: tau"):
        SCORES["mcm"](similarity=similarity, c=2)
    with pytest.raises(ValueError, match="max_logit has no parameter tau; it has: none"):
        SCORES["max_logit"](logits=similarity, tau=2)
    with pytest.raises(ValueError, match="gl_mcm needs local_similarity"):
        SCORES["gl_mcm"](similarity=similarity)
    with pytest.raises(TypeError):
        SCORES["mine"] = SCORES["mcm"]


def test_inputs_say_what_a_caller_must_offer():
    assert SCORES["delta_energy"].input == "similarity"
    assert SCORES["msp"].input == "logits"
    offered = {"similarity", "logits"}
    needy = {name for name, entry in SCORES.items() if not set(entry.inputs) <= offered}
    assert needy == {"gl_mcm", "neg_label", "neg_mcm"}


# combine


def test_combine_adds_z_scores():
    scores = torch.tensor([[1.0, 10.0], [3.0, 30.0]], dtype=torch.float64)
    combined = combine(scores, torch.tensor([1.0, 20.0]), np.array([2.0, 5.0]))
    assert combined.tolist() == [0 / 2 + -10 / 5, 2 / 2 + 10 / 5]
    with pytest.raises(ValueError, match="std must be > 0"):
        combine(scores, torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"mean must have shape \(2,\)"):
        combine(scores, torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match="mean holds 1 NaN"):
        combine(scores, torch.tensor([math.nan, 0.0]), torch.ones(2))


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("offset", [-0.6, 0.0, 0.3])
def test_neg_label_of_float32_keeps_the_odds_near_0_and_1(offset, groups):
    """Thousands of words in float32: shares of 1e-26 and of 1 - 1e-13 keep their order."""
    generator = torch.Generator().manual_seed(3)
    classes = 0.2 + 0.05 * torch.randn(40, 300, generator=generator) + offset
    words = 0.2 + 0.05 * torch.randn(40, 3001, generator=generator)
    inputs = {"similarity": classes, "negative_similarity": words}
    share = SCORES["neg_label"](**inputs, tau=0.01, groups=groups)
    wide = (100 * classes.double()).logsumexp(dim=1, keepdim=True)
    parts = [(100 * words[:, g::groups].double()).logsumexp(dim=1) for g in range(groups)]
    log_odds = wide - torch.stack(parts, dim=1)
    assert_close(share, torch.sigmoid(log_odds).mean(dim=1), rtol=1e-5, atol=0)
    # 1 - share, by the other words' share of the same sums.
    assert_close(1 - share, torch.sigmoid(-log_odds).mean(dim=1), rtol=1e-5, atol=1e-15)
