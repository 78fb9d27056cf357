"""The losses of classifiers on long tails and with outliers: the authors' code, sums by hand."""

import math

import pytest
import torch

from pipelines.ood import (
    adjusted_cross_entropy,
    complementary_distribution,
    confidence_control,
    draw_labels,
    open_sampling,
    tail_contrast,
    uniform_deviation,
)
from tests.ood import oracles

LOG = math.log


def waves(*shape, start):
    """Numbers in [-2, 2] that no generator of random numbers decides."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (2 * torch.sin(start + 1.7 * steps)).reshape(shape)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# Numbers of the authors' code, run in float64 on `waves`


# github nazim1021/OOD-detection-using-OECC, commit 8c72c42d61b11054625da2513e6222ea2308ba3b,
# CIFAR/OECC_tune_cifar.ipynb, function train: each term with weight 1 and the other's weight 0.
@pytest.mark.parametrize(
    ("ids", "outliers", "classes", "start", "accuracy", "control", "deviation"),
    [
        (5, 6, 4, 0.3, 0.9486, 0.522762586158464, 5.332466799383607),
        (7, 3, 10, 1.1, 0.7573, 1.3637772253648104, 2.826779250816503),
    ],
)
def test_oecc_equals_the_authors_code(ids, outliers, classes, start, accuracy, control, deviation):
    id_logits = waves(ids, classes, start=start)
    ood_logits = waves(outliers, classes, start=start + 1)
    assert float(confidence_control(id_logits, accuracy)) == pytest.approx(control, rel=1e-13)
    assert float(uniform_deviation(ood_logits)) == pytest.approx(deviation, rel=1e-13)


# github amazon-science/long-tailed-ood-detection, commit e578f44f743a958187ac30180bc168a0d99f207a,
# utils/loss_fn.py, function my_cl_loss_fn3, called as in stage1.py with k = 0.4; its masks were
# kept in float64. Rows of `waves`: the first view of each image, the second, one of each outlier.
@pytest.mark.parametrize(
    ("labels", "tail", "temperature", "start", "outliers", "width", "expected"),
    [
        ([0, 9, 7, 7, 2, 8, 7, 6, 9], "0000001111", 0.07, 0.3, 5, 6, 20.10494637255021),
        ([3, 0, 4, 4, 4, 1], "00011", 0.5, 1.1, 3, 4, 3.6532319354761538),
        ([2, 0, 1], "001", 0.07, 0.7, 2, 3, 18.84457175226695),
    ],
)
def test_pascl_equals_the_authors_code(labels, tail, temperature, start, outliers, width, expected):
    count = len(labels)
    rows = waves(2 * count + outliers, width, start=start)
    rows = torch.nn.functional.normalize(rows, dim=1)
    loss = tail_contrast(
        torch.stack((rows[:count], rows[count : 2 * count]), dim=1),
        rows[2 * count :],
        labels=torch.tensor(labels),
        tail_classes=torch.tensor([digit == "1" for digit in tail]),
        temperature=temperature,
    )
    assert float(loss) == pytest.approx(expected, rel=1e-13)


# github hongxin001/open-sampling, commit 79fcaf2512ed8e90188451aa23726e358d1e0d96,
# alg/ood_noise.py, function OODNoise.train_batch_with_out: the loss of the outliers, the labels
# it drew, and its rebalance_rate divided by its sum; its weights were kept in float64.
OPEN_SAMPLING = [
    (
        [50, 30, 15, 5],
        [0.0416666666666667, 0.20833333333333334, 0.3333333333333333, 0.41666666666666663],
        [2, 2, 3, 3, 1, 2],
        0.3,
        2.5758058110161963,
    ),
    (
        [500, 299, 179, 107, 64, 38, 23, 13, 8, 5],
        [
            0.0013109596224436222, 0.0540115364446775, 0.08547456738332461, 0.10435238594651285,
            0.11562663869952805, 0.12244362873623492, 0.1263765076035658, 0.12899842684845306,
            0.1303093864708967, 0.13109596224436287,
        ],
        [5, 4, 5, 5, 9, 9, 2, 7, 9],
        1.1,
        3.011639913875785,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counts", "complement", "drawn", "start", "expected"), OPEN_SAMPLING)
def test_open_sampling_equals_the_authors_code(counts, complement, drawn, start, expected):
    distribution = complementary_distribution(double(counts) / sum(counts))
    assert distribution.tolist() == pytest.approx(complement, rel=1e-12)
    logits = waves(len(drawn), len(counts), start=start)
    for weights in (distribution, len(counts) * distribution):  # their scale does not count
        loss = open_sampling(logits, torch.tensor(drawn), class_weights=weights)
        assert float(loss) == pytest.approx(expected, rel=1e-12)


# github amazon-science/long-tailed-ood-detection, commit as above, stage2.py, function train: its
# prior and loss, kept in float64.
@pytest.mark.parametrize(
    ("counts", "labels", "start", "tau", "expected"),
    [
        ([50, 30, 15, 5], [0, 0, 3, 1, 2, 0, 1], 0.3, 1.0, 2.3232859971847666),
        (
            [500, 299, 179, 107, 64, 38, 23, 13, 8, 5],
            [0, 9, 4, 0, 1, 7, 2],
            1.1,
            0.5,
            2.5003238991134453,
        ),
    ],
)
def test_logit_adjustment_equals_the_code_of_pascl(counts, labels, start, tau, expected):
    logits, targets = waves(len(labels), len(counts), start=start), torch.tensor(labels)
    for prior in (double(counts) / sum(counts), double(counts)):  # its scale does not count
        loss = adjusted_cross_entropy(logits, targets, prior, tau)
        assert float(loss) == pytest.approx(expected, rel=1e-13)


# By hand, three classes


def test_logit_adjustment_by_hand():
    # Softmax weights p_k e^{f_k}: 1, 1, 1/2 of 5/2; and 1/2, 1/4, 1/4.
    logits = double([[LOG(2), LOG(4), LOG(2)], [0.0, 0.0, 0.0]])
    prior = double([0.5, 0.25, 0.25])
    loss = adjusted_cross_entropy(logits, torch.tensor([1, 2]), prior)
    assert float(loss) == pytest.approx((LOG(5 / 2) + LOG(4)) / 2)
    plain = adjusted_cross_entropy(logits, torch.tensor([1, 2]), prior, tau=0.0)
    assert float(plain) == pytest.approx((LOG(2) + LOG(3)) / 2)


def test_oecc_by_hand():
    # The softmax is 1/4, 1/2, 1/4 in the first row and uniform in the second.
    logits = double([[0.0, LOG(2), 0.0], [5.0, 5.0, 5.0]])
    assert float(confidence_control(logits, 0.9)) == pytest.approx(0.4**2 + (0.9 - 1 / 3) ** 2)
    assert float(uniform_deviation(logits)) == pytest.approx(1 / 12 + 1 / 6 + 1 / 12)


def test_both_oecc_terms_are_sums():
    logits = waves(4, 3, start=0.5)
    twice = torch.cat((logits, logits))
    assert float(confidence_control(twice, 0.9)) == pytest.approx(
        2 * float(confidence_control(logits, 0.9))
    )
    assert float(uniform_deviation(twice)) == pytest.approx(2 * float(uniform_deviation(logits)))


def test_pascl_by_hand():
    """Two images of tail class 2 along e1 and e2, one outlier along e1; T = 1."""
    first, second = [1.0, 0.0], [0.0, 1.0]
    loss = tail_contrast(
        double([[first, first], [second, second], [first, second]]),
        double([first]),
        labels=torch.tensor([2, 2, 0]),
        tail_classes=torch.tensor([False, True, True]),
        temperature=1.0,
    )
    e = math.e
    # Of an anchor along e1: other views e, 1, 1 and the outlier e. Along e2: e, 1, 1 and 1.
    along_first = (2 * LOG(2 * e + 2) + (LOG(2 * e + 2) - 1)) / 3
    along_second = (2 * LOG(e + 3) + (LOG(e + 3) - 1)) / 3
    assert float(loss) == pytest.approx((along_first + along_second) / 2, rel=1e-14)


def test_open_sampling_by_hand():
    assert complementary_distribution(double([0.5, 0.3, 0.2])).tolist() == pytest.approx(
        [0.2 / 1.1, 0.4 / 1.1, 0.5 / 1.1]
    )
    logits = double([[0.0, LOG(2), 0.0], [0.0, 0.0, 0.0]])  # costs log 4 and log 3
    loss = open_sampling(logits, torch.tensor([0, 2]), class_weights=double([1.0, 9.0, 3.0]))
    assert float(loss) == pytest.approx((LOG(4) + 3 * LOG(3)) / 4)


# Degenerate batches


def pascl_batch():
    rows = torch.nn.functional.normalize(waves(13, 4, start=0.2), dim=1)
    return {
        "id_projections": rows[:10].reshape(5, 2, 4).requires_grad_(),
        "ood_projections": rows[10:].clone().requires_grad_(),
        "labels": torch.tensor([0, 1, 1, 0, 2]),
        "tail_classes": torch.tensor([False, False, True]),
    }


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def test_a_batch_without_tail_images_costs_nothing():
    batch = pascl_batch() | {"tail_classes": torch.zeros(3, dtype=torch.bool)}
    loss = tail_contrast(**batch)
    assert loss.item() == 0.0
    for gradient in gradients(loss, batch["id_projections"], batch["ood_projections"]):
        assert not gradient.any()


def test_a_lone_tail_image_has_its_other_view_as_its_positive():
    batch = pascl_batch()
    (one, other), outliers = batch["id_projections"][4].tolist(), batch["ood_projections"].tolist()
    expected = oracles.tail_contrast([[one, other]], outliers, [0], [True])
    assert tail_contrast(**batch).item() == pytest.approx(expected, rel=1e-13)


def test_images_of_other_classes_enter_nowhere():
    batch = pascl_batch()
    (gradient,) = gradients(tail_contrast(**batch), batch["id_projections"])
    assert not gradient[:4].any()
    assert gradient[4].abs().min() > 0


def test_more_than_two_views():
    rows = torch.nn.functional.normalize(waves(14, 5, start=0.9), dim=1)
    ids, outliers = rows[:12].reshape(4, 3, 5), rows[12:]
    labels, tail = [1, 0, 1, 2], [False, True, True]
    loss = tail_contrast(
        ids, outliers, labels=torch.tensor(labels), tail_classes=torch.tensor(tail), temperature=0.2
    )
    expected = oracles.tail_contrast(ids.tolist(), outliers.tolist(), labels, tail, 0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-13)


def test_equal_shares_give_the_uniform_distribution():
    assert complementary_distribution(torch.full((8,), 1 / 8)).tolist() == [1 / 8] * 8
    assert complementary_distribution(torch.ones(1)).tolist() == [1.0]
    assert complementary_distribution(double([1.0, 0.0, 0.0])).tolist() == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_complement_is_a_distribution_in_at_least_float32(dtype):
    complement = complementary_distribution(torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=dtype))
    assert complement.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(complement.sum()) == pytest.approx(1.0, abs=1e-6)
    assert (complement > 0).all()


# Drawn labels


def test_labels_are_drawn_from_the_distribution():
    distribution = double([0.5, 0.0, 0.2, 0.3])
    labels = draw_labels(distribution, 20_000, generator=torch.Generator().manual_seed(0))
    assert labels.shape == (20_000,)
    assert labels.dtype == torch.int64
    shares = torch.bincount(labels, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx(distribution.tolist(), abs=0.015)  # 4 sigma
    assert shares[1] == 0


def test_the_generator_alone_decides_the_labels():
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw_labels(torch.ones(9) / 9, 50, generator=generator).tolist() for _ in range(2)]

    state = torch.random.get_rng_state()
    assert drawn(1) == drawn(1)
    assert drawn(1)[0] != drawn(1)[1]
    assert drawn(1) != drawn(2)
    assert torch.equal(torch.random.get_rng_state(), state)


# Large logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_stay_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    drawn, weights = torch.tensor([1, 0]), torch.ones(3, dtype=dtype)
    losses = [
        (confidence_control(logits, 0.75), 1 / 16 + 1 / 16),  # confidences 1 and 1/2
        (uniform_deviation(logits), 4 / 3 + 2 / 3),
        (open_sampling(logits, drawn, class_weights=weights), 2e4 + LOG(2) / 2),
    ]
    for loss, expected in losses:
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert gradients(loss, logits)[0].isfinite().all()


def test_similarities_of_ten_thousand_temperatures_stay_finite():
    batch = pascl_batch()
    loss = tail_contrast(**batch, temperature=1e-4)
    assert loss.isfinite()
    for gradient in gradients(loss, batch["id_projections"], batch["ood_projections"]):
        assert gradient.isfinite().all()


# Refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"temperature": -1.0}, "temperature must be a finite number > 0"),
        ({"id_projections": torch.ones(5, 4)}, "id_projections must have 3 dimensions"),
        ({"id_projections": torch.ones(5, 1, 4)}, r"at least 2 views .* came shape \(5, 1, 4\)"),
        ({"ood_projections": torch.ones(3, 2, 4)}, "ood_projections must have 2 dimensions"),
        ({"ood_projections": torch.ones(3, 5)}, r"same width, .* \(5, 2, 4\) and \(3, 5\)"),
        ({"ood_projections": torch.full((3, 4), math.nan)}, "ood_projections holds 12 NaN"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, r"labels must lie in 0\.\.2, came 0 to 3"),
        ({"labels": torch.zeros(4).long()}, r"labels must be integers of shape \(5,\)"),
        ({"tail_classes": torch.tensor([2])}, r"tail_classes must be booleans of shape \(K,\)"),
        ({"tail_classes": torch.ones(1, 3).bool()}, r"tail_classes must be .* shape \(1, 3\)"),
    ],
)
def test_pascl_refuses_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        tail_contrast(**(pascl_batch() | change))


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, 94.86, math.nan, math.inf])
def test_accuracies_are_shares(accuracy):
    with pytest.raises(ValueError, match=r"train_accuracy must be a share in 0\.\.1, came"):
        confidence_control(torch.zeros(2, 3), accuracy)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (torch.tensor([0.5, 0.4]), "class_shares must sum to 1, came sum 0.9"),
        (torch.tensor([50.0, 50.0]), "class_shares must sum to 1, came sum 100"),
        (torch.tensor([1.5, -0.5]), "class_shares must be >= 0"),
        (torch.tensor([0.5, math.nan]), "class_shares holds 1 NaN"),
        (torch.full((2, 2), 0.25), "class_shares must have 1 dimensions"),
        (torch.tensor([3, 2]), "class_shares must be floating-point, came torch.int64"),
        (torch.zeros(0), "class_shares must have shape"),
    ],
)
def test_shares_that_are_none_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        complementary_distribution(shares)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drawn_labels": torch.tensor([0, 3])}, r"drawn_labels must lie in 0\.\.2, came 0 to 3"),
        ({"drawn_labels": torch.tensor([0, -1])}, r"drawn_labels must lie in 0\.\.2"),
        ({"drawn_labels": torch.tensor([0])}, r"drawn_labels must be integers of shape \(2,\)"),
        ({"class_weights": torch.ones(4)}, r"class_weights must have shape \(3,\), came \(4,\)"),
        ({"class_weights": torch.tensor([0.0, 0.0, 1.0])}, "class_weights are 0 for every drawn"),
        ({"class_weights": torch.tensor([1.0, -1.0, 1.0])}, "class_weights must be >= 0"),
    ],
)
def test_open_sampling_refuses_bad_input(change, message):
    inputs = {
        "ood_logits": torch.zeros(2, 3),
        "drawn_labels": torch.tensor([0, 1]),
        "class_weights": torch.ones(3),
    }
    with pytest.raises(ValueError, match=message):
        open_sampling(**(inputs | change))


def test_draws_need_a_number_and_a_distribution():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="num_labels must be >= 1, came 0"):
        draw_labels(torch.ones(3), 0, generator=generator)
    with pytest.raises(ValueError, match="distribution must be >= 0 with at least one > 0"):
        draw_labels(torch.zeros(3), 1, generator=generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_prior": torch.tensor([0.5, 0.5, 0.0])}, "must be > 0 .* came 0 for class 2"),
        ({"class_prior": torch.ones(4)}, r"class_prior must have shape \(3,\), came \(4,\)"),
        ({"class_prior": torch.tensor([2, 1, 1])}, "class_prior must be floating-point"),
        ({"labels": torch.tensor([0, 3])}, r"labels must lie in 0\.\.2, came 0 to 3"),
        ({"tau": -1.0}, "tau must be a finite number >= 0, came -1.0"),
        ({"tau": math.inf}, "tau must be a finite number >= 0, came inf"),
    ],
)
def test_logit_adjustment_refuses_bad_input(change, message):
    inputs = {
        "id_logits": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "class_prior": torch.tensor([0.5, 0.3, 0.2]),
    }
    with pytest.raises(ValueError, match=message):
        adjusted_cross_entropy(**(inputs | change))
