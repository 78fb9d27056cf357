import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ood import (
    LOSSES,
    balance_weight,
    balanced_energy_margin,
    delta_energy_bound,
    energy_margin,
    energy_single_margin,
    masked_energy_change,
    outlier_exposure,
)
from tests.ood import oracles
from tests.ood.oracles import PROPERTY, similarities

MARGINS = {"m_in": -3.0, "m_out": -1.0}
# Parameters every loss is judged at; margins lie inside the energies, so that every hinge is open.
SETTINGS = {
    "energy_margin": [MARGINS, {**MARGINS, "tau": 0.5}],
    "energy_single_margin": [{"margin": 2.0}],
    "balanced_energy_margin": [
        {**MARGINS, "alpha": 2.0, "gamma": 0.5},
        {**MARGINS, "alpha": 2.0, "gamma": 0.5, "tau": 2.0, "reduction": "mean"},
    ],
    "outlier_exposure": [{}],
    "delta_energy_bound": [
        {"tau": 0.2, "keep": 0.5, "scope": "image"},
        {"tau": 0.2, "keep": 0.3, "scope": "top"},
    ],
    "confidence_control": [{"train_accuracy": 0.9}, {"train_accuracy": 0.4}],
    "uniform_deviation": [{}],
    "tail_contrast": [{}, {"temperature": 0.5}],
    "open_sampling": [{}],
    "adjusted_cross_entropy": [{}, {"tau": 0.5}],
}
# Inputs that no loss differentiates, or that are no floating-point numbers.
GIVEN = ("prior", "labels", "tail_classes", "drawn_labels", "class_weights", "class_prior")
CASES = [
    pytest.param(name, setting, id=f"{name}-{setting}")
    for name in LOSSES
    for setting in SETTINGS[name]
]
every_case = pytest.mark.parametrize(("name", "setting"), CASES)


def sample_inputs(*, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "id_logits": normal(5, 4),
        "ood_logits": normal(6, 4),
        "prior": torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=dtype),
        "image_features": torch.nn.functional.normalize(normal(5, 8), dim=1),
        "text_features": torch.nn.functional.normalize(normal(4, 8), dim=1),
        "labels": torch.tensor([0, 3, 1, 1, 2]),
        "id_projections": torch.nn.functional.normalize(normal(5, 2, 8), dim=2),
        "ood_projections": torch.nn.functional.normalize(normal(6, 8), dim=1),
        "tail_classes": torch.tensor([False, True, False, True]),
        "drawn_labels": torch.tensor([2, 2, 3, 1, 0, 3]),
        "class_weights": torch.tensor([0.25, 0.75, 1.5, 1.5], dtype=dtype),
        "class_prior": torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=dtype),
    }


# Oracles: plain Python loops over lists of floats


def lse(row):
    return oracles.energy(row)


def energies(logits, tau=1.0):
    return [-oracles.energy(row, tau) for row in logits]


def mean(values):
    return math.fsum(values) / len(values)


def hinge(value):
    return max(0.0, value)


def energy_margin_oracle(id_logits, ood_logits, m_in, m_out, tau=1.0):
    id_terms = [hinge(e - m_in) ** 2 for e in energies(id_logits, tau)]
    return mean(id_terms) + mean([hinge(m_out - e) ** 2 for e in energies(ood_logits, tau)])


def energy_single_margin_oracle(id_logits, ood_logits, margin):
    return hinge(mean(energies(id_logits)) - mean(energies(ood_logits)) + margin)


def balance_weight_oracle(row, prior, gamma):
    powers = [share**gamma for share in prior]
    exponentials = [math.exp(f) for f in row]
    weighted = [e * p for e, p in zip(exponentials, powers, strict=True)]
    return math.fsum(weighted) / math.fsum(exponentials) / math.fsum(powers)


def balanced_oracle(
    id_logits, ood_logits, prior, m_in, m_out, alpha, gamma, tau=1.0, reduction="weighted"
):
    weights = [balance_weight_oracle(row, prior, gamma) for row in ood_logits]
    terms = [
        z * hinge(m_out + alpha * z - e) ** 2
        for z, e in zip(weights, energies(ood_logits, tau), strict=True)
    ]
    outliers = math.fsum(terms) / (math.fsum(weights) if reduction == "weighted" else len(terms))
    return mean([hinge(e - m_in) ** 2 for e in energies(id_logits, tau)]) + outliers


def outlier_exposure_oracle(ood_logits):
    """Cross-entropy of the uniform distribution to the softmax, class by class."""
    return mean(
        [-math.fsum(math.log(math.exp(f - lse(row))) / len(row) for f in row) for row in ood_logits]
    )


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def energy_change_oracle(image, texts, label, tau, keep, scope):
    """E2 - E0 of one sample, and its masked similarity to its own text."""
    width = len(image)
    product = [image[i] * texts[label][i] for i in range(width)]
    num_kept = max(1, round(keep * width))
    kept = sorted(range(width), key=lambda i: product[i], reverse=True)[:num_kept]
    masked_image = [image[i] if i in kept else 0.0 for i in range(width)]
    before = [dot(image, text) / tau for text in texts]
    if scope == "image":
        after = [dot(masked_image, text) / tau for text in texts]
    else:
        after = list(before)
        after[label] = dot(masked_image, texts[label]) / tau
    return lse(before) - lse(after), after[label] * tau


def bound_oracle(image_features, text_features, labels, tau, keep, scope):
    changes = [
        energy_change_oracle(image, text_features, label, tau, keep, scope)[0]
        for image, label in zip(image_features, labels, strict=True)
    ]
    return -mean(changes)


ORACLES = {
    "energy_margin": energy_margin_oracle,
    "energy_single_margin": energy_single_margin_oracle,
    "balanced_energy_margin": balanced_oracle,
    "outlier_exposure": outlier_exposure_oracle,
    "delta_energy_bound": bound_oracle,
    "confidence_control": oracles.confidence_control,
    "uniform_deviation": oracles.uniform_deviation,
    "tail_contrast": oracles.tail_contrast,
    "open_sampling": oracles.open_sampling,
    "adjusted_cross_entropy": oracles.adjusted_cross_entropy,
}


def oracle(name, inputs, setting):
    return ORACLES[name](*(inputs[needed].tolist() for needed in LOSSES[name].inputs), **setting)


def test_every_loss_has_an_oracle_and_settings():
    assert set(ORACLES) == set(SETTINGS) == set(LOSSES)


@every_case
@pytest.mark.parametrize(
    ("dtype", "expected_dtype", "rtol"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.float16, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
    ],
)
def test_equals_its_oracle(name, setting, dtype, expected_dtype, rtol):
    inputs = sample_inputs(dtype=dtype)
    loss = LOSSES[name](**inputs, **setting)
    assert loss.shape == ()
    assert loss.dtype == expected_dtype
    expected = oracle(name, inputs, setting)
    assert abs(expected) > 1e-3
    assert float(loss) == pytest.approx(expected, rel=rtol)


@every_case
def test_gradients_are_right(name, setting):
    inputs = sample_inputs()
    learned = [key for key in LOSSES[name].inputs if key not in GIVEN]

    def loss(*values):
        return LOSSES[name](**{**inputs, **dict(zip(learned, values, strict=True))}, **setting)

    values = [inputs[key].clone().requires_grad_() for key in learned]
    assert torch.autograd.gradcheck(loss, values)
    gradients = torch.autograd.grad(loss(*values), values)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


@every_case
def test_numpy_arrays_are_taken(name, setting):
    inputs = sample_inputs(dtype=torch.float32)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    assert float(LOSSES[name](**arrays, **setting)) == float(LOSSES[name](**inputs, **setting))


@every_case
def test_nan_and_infinity_are_refused(name, setting):
    for needed in LOSSES[name].inputs:
        inputs = sample_inputs()
        if not inputs[needed].is_floating_point():
            continue
        inputs[needed].view(-1)[-1] = math.nan
        with pytest.raises(ValueError, match=f"{needed} holds 1 NaN or infinite"):
            LOSSES[name](**inputs, **setting)


@every_case
def test_empty_batches_and_wrong_ranks_are_refused(name, setting):
    for needed in LOSSES[name].inputs:
        if needed in GIVEN:
            continue
        inputs = sample_inputs()
        rank = inputs[needed].ndim
        with pytest.raises(ValueError, match=f"{needed} is empty"):
            LOSSES[name](**{**inputs, needed: inputs[needed][:0]}, **setting)
        with pytest.raises(ValueError, match=f"{needed} must have {rank} dimensions"):
            LOSSES[name](**{**inputs, needed: inputs[needed][0]}, **setting)


def test_pytorch_ood_agrees():
    losses = pytest.importorskip("pytorch_ood.loss")
    inputs = sample_inputs()
    logits = torch.cat((inputs["id_logits"], inputs["ood_logits"]))
    targets = torch.cat((torch.zeros(5), torch.full((6,), -1))).long()
    cross_entropy = torch.nn.functional.cross_entropy(inputs["id_logits"], targets[:5])
    theirs = losses.EnergyRegularizedLoss(alpha=1.0, margin_in=-3.0, margin_out=-1.0)
    ours = energy_margin(inputs["id_logits"], inputs["ood_logits"], **MARGINS)
    expected = float(theirs(logits, targets) - cross_entropy)
    assert float(ours) == pytest.approx(expected, rel=1e-12)
    exposure = losses.OutlierExposureLoss(alpha=1.0, reduction="none")
    expected = float(exposure(logits.float(), targets)[5:].mean())
    assert float(outlier_exposure(inputs["ood_logits"])) == pytest.approx(expected, rel=1e-6)


# Margins and balance


def test_margin_loss_is_zero_where_margins_hold():
    confident, flat = torch.full((3, 2), 30.0), torch.zeros(3, 2)
    assert float(energy_margin(confident, flat, m_in=-20.0, m_out=-1.0)) == 0.0
    assert float(energy_margin(flat, confident, m_in=-20.0, m_out=-1.0)) > 100.0


def test_single_margin_holds_the_gap_only():
    inputs = sample_inputs()
    loss = energy_single_margin(inputs["id_logits"], inputs["ood_logits"], margin=2.0)
    moved = energy_single_margin(inputs["id_logits"] + 7, inputs["ood_logits"] + 7, margin=2.0)
    assert float(moved) == pytest.approx(float(loss), rel=1e-12)


@PROPERTY
@given(id_logits=similarities(min_classes=4, max_classes=4), scale=st.sampled_from([1.0, 10.0]))
def test_balanced_reduces_to_plain_at_alpha_gamma_zero(id_logits, scale):
    inputs = sample_inputs()
    id_logits, ood_logits = scale * id_logits, scale * inputs["ood_logits"]
    plain = energy_margin(id_logits, ood_logits, **MARGINS)
    balanced = balanced_energy_margin(
        id_logits, ood_logits, inputs["prior"], **MARGINS, alpha=0.0, gamma=0.0
    )
    assert abs(float(balanced - plain)) <= 1e-12 * max(1.0, float(plain))


def test_with_reduction_mean_the_outlier_term_is_one_kth():
    inputs = sample_inputs()
    settled = torch.full((1, 4), 50.0, dtype=torch.float64)  # its ID term is 0
    plain = energy_margin(settled, inputs["ood_logits"], **MARGINS)
    balanced = balanced_energy_margin(
        settled,
        inputs["ood_logits"],
        inputs["prior"],
        **MARGINS,
        alpha=0.0,
        gamma=0.0,
        reduction="mean",
    )
    assert float(balanced) == pytest.approx(float(plain) / 4, rel=1e-12)


def test_outliers_of_the_majority_class_weigh_more():
    prior = torch.tensor([0.7, 0.2, 0.1])
    weight = balance_weight(10 * torch.eye(3), prior, gamma=0.75)
    assert weight[0] > weight[1] > weight[2]


@pytest.mark.parametrize("gamma", [0.0, 0.005, 0.75, 3.0])
def test_classes_without_outliers_stay_finite(gamma):
    prior = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    # The second outlier has all its softmax on a class without prior: Z underflows.
    ood_logits = torch.tensor([[0.0, 0.0, 0.0], [-900.0, 900.0, 0.0]], dtype=torch.float64)
    ood_logits.requires_grad_()
    for outliers in (ood_logits, ood_logits[1:]):
        loss = balanced_energy_margin(
            torch.zeros(1, 3), outliers, prior, **MARGINS, alpha=10.0, gamma=gamma
        )
        (gradient,) = torch.autograd.grad(loss, ood_logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    expected = balance_weight_oracle([0.0] * 3, prior.tolist(), gamma)
    assert float(balance_weight(ood_logits.detach(), prior, gamma)[0]) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m_in": -1.0, "m_out": -3.0}, "m_in must be below m_out"),
        ({"m_in": -1.0, "m_out": -1.0}, "m_in must be below m_out"),
        ({"m_in": math.nan}, "m_in must be finite"),
        ({"alpha": -1.0}, "alpha must be a finite number >= 0"),
        ({"gamma": -1.0}, "gamma must be a finite number >= 0"),
        ({"tau": 0.0}, "tau must be a finite number > 0"),
        ({"reduction": "sum"}, "reduction must be 'weighted' or 'mean', came 'sum'"),
        ({"prior": torch.ones(3)}, r"prior must have shape \(4,\), came \(3,\)"),
        ({"prior": torch.zeros(4)}, "at least one > 0"),
        ({"prior": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "prior must be >= 0"),
    ],
)
def test_balanced_loss_refuses_bad_parameters(change, message):
    given_values = {**sample_inputs(), **MARGINS, "alpha": 1.0, "gamma": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        LOSSES["balanced_energy_margin"](**given_values)


def test_margins_must_be_ordered_and_finite():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="m_in must be below m_out"):
        energy_margin(logits, logits, m_in=0.0, m_out=-1.0)
    with pytest.raises(ValueError, match="margin must be finite"):
        energy_single_margin(logits, logits, margin=math.inf)


# Outlier exposure


def test_outlier_exposure_is_least_for_flat_logits():
    assert float(outlier_exposure(torch.full((2, 4), 3.0))) == pytest.approx(math.log(4), rel=1e-6)
    assert float(outlier_exposure(torch.tensor([[5.0, 0.0, 0.0, 0.0]]))) > math.log(4)


# The bound


@pytest.mark.parametrize("scope", ["image", "top"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeping_everything_gives_exactly_zero(scope, dtype):
    generator = torch.Generator().manual_seed(2)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(n, 33, generator=generator, dtype=dtype), dim=1)
        for n in (64, 17)
    )
    labels = torch.randint(17, (64,), generator=generator)
    for tau in (1.0, 0.07, 0.01):
        change = masked_energy_change(images, texts, labels, tau, 1.0, scope)
        assert change.tolist() == [0.0] * 64
        assert float(delta_energy_bound(images, texts, labels, tau, 1.0, scope)) == 0.0


@pytest.mark.parametrize("keep", [1e-9, 0.1, 0.25, 0.49, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["image", "top"])
def test_energy_change_of_each_sample(scope, keep):
    inputs = sample_inputs()
    features = inputs["image_features"], inputs["text_features"], inputs["labels"]
    changes = masked_energy_change(*features, 0.3, keep, scope)
    images, texts, labels = (value.tolist() for value in features)
    for change, image, label in zip(changes.tolist(), images, labels, strict=True):
        expected, _ = energy_change_oracle(image, texts, label, 0.3, keep, scope)
        assert change == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_the_mask_passes_no_gradient():
    """With D = 2 and one entry kept, only that entry of the label's text moves s'_y."""
    image = torch.tensor([[0.8, 0.6]], dtype=torch.float64)
    texts = torch.tensor([[0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    loss = delta_energy_bound(image, texts, torch.tensor([0]), 1.0, 0.5, "top")
    (gradient,) = torch.autograd.grad(loss, texts)
    # K = 1: E0 - E2 = s' - s = -0.6 * h_2
    assert gradient.tolist() == [pytest.approx([0.0, -0.6], abs=1e-15)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "keep must be > 0 and <= 1, came 0.0"),
        ({"keep": 1.5}, "keep must be > 0 and <= 1"),
        ({"keep": math.nan}, "keep must be > 0 and <= 1"),
        ({"scope": "text"}, "scope must be 'image' or 'top', came 'text'"),
        ({"tau": -1.0}, "tau must be a finite number > 0"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4])}, r"labels must lie in 0\.\.3, came 0 to 4"),
        ({"labels": torch.tensor([-1, 1, 2, 3, 0])}, r"labels must lie in 0\.\.3, came -1 to 3"),
        ({"labels": torch.zeros(4).long()}, r"integers of shape \(5,\)"),
        ({"labels": torch.zeros(5)}, r"integers of shape \(5,\), came torch.float32"),
        ({"text_features": torch.ones(4, 7)}, r"same width, came shapes \(5, 8\) and \(4, 7\)"),
    ],
)
def test_bound_refuses_bad_input(change, message):
    given_values = {**sample_inputs(), "tau": 1.0, "keep": 0.5, "scope": "top", **change}
    with pytest.raises(ValueError, match=message):
        LOSSES["delta_energy_bound"](**given_values)


# The table


def test_table_says_what_each_loss_needs():
    assert LOSSES["energy_margin"].required == ("m_in", "m_out")
    assert dict(LOSSES["energy_margin"].parameters) == {"tau": 1.0}
    assert LOSSES["balanced_energy_margin"].required == ("m_in", "m_out", "alpha", "gamma")
    with pytest.raises(ValueError, match="energy_margin needs m_in, m_out"):
        LOSSES["energy_margin"](id_logits=np.zeros((1, 2)), ood_logits=np.zeros((1, 2)))
