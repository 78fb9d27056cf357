"""Scores with a state: by hand, as the authors' own code computes them, and what they promise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipelines.ood.streams import (
    TANL,
    AdaNeg,
    AdaNegSettings,
    StreamScore,
    TANLSettings,
    otsu_threshold,
)


def run(score: StreamScore, images: Tensor, size: int) -> Tensor:
    return torch.cat([score.step(part) for part in torch.split(images, size)])


def unit(rows: Sequence[Sequence[float]] | Tensor) -> Tensor:
    tensor = torch.as_tensor(rows, dtype=torch.float64)
    return tensor / tensor.norm(dim=1, keepdim=True)


def sines(count: int, step: float, shift: float) -> Tensor:
    """Unit rows (count, 6) that follow from their numbers."""
    return unit(
        torch.sin(step * torch.arange(6.0 * count, dtype=torch.float64) + shift).view(-1, 6)
    )


# The public code of both papers (YBZh/OpenOOD-VLM, commit 804f331) on these rows in float64, in
# batches of 10: `TTAPromptPostprocessor_noadagap` with logit scale 10, memory 3, gap 0.2, lambda
# 0.1, and `ActivatedNegPostprocessor` with queues of 5 and gap 0.3; its random orders replaced by
# the natural one. Every fourth score, then the mean of all 30.
TEXT = sines(8, 1.3, 0.2)
CLASSES, NEGATIVES, NOISE = TEXT[:2], TEXT[2:], sines(4, 0.9, 0.1)
NEAREST = [5 * i % 8 if i % 3 else i % 2 for i in range(30)]
IMAGES = unit(sines(30, 0.7, 0.5) + TEXT[NEAREST])
ADA_NEG = {
    (1, 5.0): [
        0.1270761018, 0.5685968338, 1.020132269, 0.1482836508, 0.8388997951, 1.010849661,
        0.1411913444, 0.3619969316, 0.3460477914,
    ],
    (2, 5.0): [
        0.9738993813, 0.602000453, 0.8764367518, 0.9650351387, 0.8595984736, 0.8031734768,
        0.954427221, 0.4672267609, 0.658011437,
    ],
    (1, None): [
        0.07518878842, 0.5897065515, 1.035817061, 0.09461100398, 0.7935770435, 1.034564621,
        0.08654525, 0.2090505373, 0.2833001831,
    ],
}  # fmt: skip
TANL_SCORES = {
    (4, 1, 0.0): [
        0.9995732889, 0.9897948139, 0.9999979197, 0.9995588897, 0.9982793461, 0.9999871346,
        0.9995966363, 0.9256423529, 0.7187790093,
    ],
    (4, 0, 0.0): [
        0.9987365267, 0.975146436, 0.9999947535, 0.9992474779, 0.9973534429, 0.9999846861,
        0.9995375743, 0.9059589478, 0.6906381672,
    ],
    (5, 2, 0.3): [
        0.7905809232, 0.8055207917, 0.9003033961, 0.9993632544, 0.9680329215, 0.8797486357,
        0.8026322128, 0.7562884681, 0.6424526072,
    ],
}  # fmt: skip


def ada_neg(groups: int = 1, beta: float | None = 5.0) -> AdaNeg:
    settings = AdaNegSettings(length=3, gap=0.2, weight=0.1, beta=beta, tau=0.1, groups=groups)
    return AdaNeg(CLASSES, NEGATIVES, settings)


def tanl(num_labels: int = 4, stride: int = 1, history: float = 0.0) -> TANL:
    settings = TANLSettings(
        num_labels=num_labels, length=5, gap=0.3, history=history, stride=stride, tau=0.1
    )
    return TANL(CLASSES, NEGATIVES, settings, NOISE)


@pytest.mark.parametrize(("groups", "beta"), ADA_NEG)
def test_ada_neg_as_by_the_authors_own_code(groups: int, beta: float | None) -> None:
    scores = run(ada_neg(groups, beta), IMAGES, 10)
    found = [*scores[::4].tolist(), float(scores.mean())]
    assert found == pytest.approx(ADA_NEG[groups, beta], rel=1e-9)


@pytest.mark.parametrize(("num_labels", "stride", "history"), TANL_SCORES)
def test_tanl_as_by_the_authors_own_code(num_labels: int, stride: int, history: float) -> None:
    scores = run(tanl(num_labels, stride, history), IMAGES, 10)
    found = [*scores[::4].tolist(), float(scores.mean())]
    assert found == pytest.approx(TANL_SCORES[num_labels, stride, history], rel=1e-9)


def test_ada_neg_by_hand() -> None:
    """One class and two words along the axes; the image (0, 0.8, 0.6) joins the first word.

    Its proxy is the mean of (0, 1, 0) and the image, at a cosine of sqrt(0.9) with it.
    """
    axes = torch.eye(3, dtype=torch.float64)
    settings = AdaNegSettings(tau=0.2, beta=None, groups=1)
    score = AdaNeg(axes[:1], axes[1:], settings)
    static = 1 / (1 + math.exp(0.8 / 0.2) + math.exp(0.6 / 0.2))
    adapted = 1 / (1 + math.exp(math.sqrt(0.9) / 0.2) + math.exp(0.6 / 0.2))
    found = score.step(torch.tensor([[0.0, 0.8, 0.6]], dtype=torch.float64))
    assert float(found) == pytest.approx(adapted + 0.1 * static, rel=1e-12)


# Of one class (1, 0, 0) and words (0, 1, 0), (0, 0, 1): three images of the first word, the less
# sure the nearer they are to the second, and one between class and first word, which joins neither.
AXES = torch.eye(3, dtype=torch.float64)
SURE, LESS, LEAST = unit([[0.1, 1, 0.1], [0.1, 1, 0.3], [0.1, 1, 0.5]]).split(1)
BETWEEN = unit([[1.0, 1.0, 0.0]])


def after(*images: Tensor, length: int = 2) -> float:
    """The score of the image between class and word, after these images."""
    score = AdaNeg(AXES[:1], AXES[1:], AdaNegSettings(length=length, tau=0.1, groups=1))
    for image in images:
        score.step(image)
    return float(score.step(BETWEEN))


def test_a_full_memory_keeps_the_images_of_the_least_entropy() -> None:
    assert after(LESS, SURE, LEAST) == after(SURE)
    assert after(SURE, LESS) == after(SURE)
    assert len({after(image) for image in (SURE, LESS, LEAST)}) == 3
    assert after(LEAST, LESS, SURE, length=3) == pytest.approx(after(LESS, SURE, length=3))
    assert after(BETWEEN, BETWEEN) == after()


def test_a_memory_of_one_row_holds_its_text_feature() -> None:
    assert after(SURE, LESS, length=1) == after()
    assert after() == pytest.approx(1.1 / (2 + math.exp(-math.sqrt(0.5) / 0.1)), rel=1e-12)


def test_what_ada_neg_gives_depends_on_the_order() -> None:
    backwards = run(ada_neg(), IMAGES.flip(0), 10).flip(0)
    assert not torch.allclose(run(ada_neg(), IMAGES, 10), backwards, atol=1e-3)


def test_ada_negs_memory_does_not_depend_on_the_cut_into_batches() -> None:
    whole, halves, one = (run(ada_neg(), IMAGES, size) for size in (30, 15, 1))
    torch.testing.assert_close(whole[15:], halves[15:], rtol=0, atol=1e-12)
    torch.testing.assert_close(whole[-1], one[-1], rtol=0, atol=1e-12)
    assert not torch.allclose(whole[:15], halves[:15], atol=1e-3)


def test_tanl_depends_on_the_order_and_on_the_cut_into_batches() -> None:
    scores = run(tanl(), IMAGES, 10)
    assert not torch.allclose(scores, run(tanl(), IMAGES.flip(0), 10).flip(0), atol=1e-3)
    assert not torch.allclose(scores, run(tanl(), IMAGES, 15), atol=1e-3)


@pytest.mark.parametrize("make", [ada_neg, tanl])
def test_equal_streams_have_equal_scores_in_their_range(make: type[StreamScore]) -> None:
    first, second = (run(make(), IMAGES, 7) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.float64
    assert ((first >= 0) & (first <= 1.1)).all()


def test_tanl_by_hand() -> None:
    """The class (1, 0, 0) activates both words alike, so the first one begins: (0, 1, 0).

    By it the image of the second word has the score 1/2, that of the class 1 / (1 + e^-5). The
    classes' own feature has that too; 0.51 .. 0.99 part these scores, 0.75 is their middle. The
    second word is then the one that the unknown image activates.
    """
    unsure, sure = 1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))
    # Words chosen by the batch alone, then by the past alone: it takes effect one batch later.
    for history, first in ((0.0, unsure), (1.0, 0.5)):
        settings = TANLSettings(num_labels=1, tau=0.2, gap=0.0, history=history)
        score = TANL(AXES[:1], AXES[1:], settings)
        assert score.step(AXES[[2, 0]]).tolist() == pytest.approx([first, sure], rel=1e-12)
        assert score.step(AXES[[2]]).tolist() == pytest.approx([unsure], rel=1e-12)


@pytest.mark.parametrize(
    ("scores", "threshold"),
    [
        ([0.1, 0.1, 0.9], 0.51),  # 0.11 .. 0.90 part them alike
        ([0.2, 0.25, 0.8, 0.9], 0.53),  # 0.26 .. 0.80
        ([0.7, 0.7], 0.5),  # no threshold parts them
        ([0.905, 0.915, 0.955], 0.94),  # all ID: 0.92 .. 0.95 part them all the same
    ],
)
def test_otsus_threshold(scores: list[float], threshold: float) -> None:
    assert otsu_threshold(torch.tensor(scores, dtype=torch.float64)) == threshold


def half(images: Tensor) -> Tensor:
    return images.to(torch.float16)


def test_no_half_precision_nan_reaches_a_memory() -> None:
    """The trap of the public code: log(p + 1e-8) is -inf in float16 where p is 0."""
    tau = 0.01
    p = (half(IMAGES) @ half(NEGATIVES).T / tau).softmax(dim=1)
    assert (p * (p + 1e-8).log()).sum(dim=1).isnan().any()
    settings = AdaNegSettings(length=3, tau=tau, groups=1)
    scores = [
        run(AdaNeg(kind(CLASSES), kind(NEGATIVES), settings), kind(IMAGES), 10)
        for kind in (half, lambda rows: half(rows).double())
    ]
    assert scores[0].isfinite().all()
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-6)
    active = TANL(half(CLASSES), half(NEGATIVES), TANLSettings(tau=tau))
    assert run(active, half(IMAGES), 10).isfinite().all()


def test_an_id_only_stream_of_sure_images_stays_id() -> None:
    images = unit(AXES[:1] + 0.1 * torch.sin(torch.arange(60.0)).view(20, 3).abs())
    adaptive = AdaNeg(AXES[:1], AXES[1:], AdaNegSettings(tau=0.1, groups=1))
    assert (run(adaptive, images, 5) > 1.09).all()
    assert (run(TANL(AXES[:1], AXES[1:], TANLSettings(tau=0.1)), images, 5) > 0.99).all()


def test_an_id_only_stream_of_unsure_images_drives_them_further_down() -> None:
    """Class images that a word is nearer to join that word, and draw its proxy to the class."""
    images = unit([[0.8, 1.0, 0.01 * n] for n in range(8)])
    adaptive = AdaNeg(AXES[:1], AXES[1:], AdaNegSettings(tau=0.1, groups=1))
    first, *_, last = run(adaptive, images[[*range(8), 0]], 1).tolist()
    fixed = AdaNeg(AXES[:1], AXES[1:], AdaNegSettings(tau=0.1, groups=1, length=1))
    assert last < 0.3 * float(fixed.step(images[:1])) < 1.1 * 0.25
    assert last < first


@pytest.mark.parametrize("make", [AdaNeg, TANL])
def test_what_is_wrong_is_said(make: type[AdaNeg] | type[TANL]) -> None:
    with pytest.raises(ValueError, match="rows of one size"):
        make(CLASSES, NEGATIVES[:, :5])
    with pytest.raises(ValueError, match="words is empty"):
        make(CLASSES, NEGATIVES[:0])
    score = make(CLASSES, NEGATIVES)
    with pytest.raises(ValueError, match=r"features need rows of 6 numbers.*came \(30, 5\)"):
        score.step(IMAGES[:, :5])
    with pytest.raises(ValueError, match="features holds 1 NaN"):
        score.step(torch.where(IMAGES.max() == IMAGES, math.nan, IMAGES))


def test_settings_out_of_range() -> None:
    for ada in (AdaNegSettings(gap=1.1), AdaNegSettings(tau=0), AdaNegSettings(length=0)):
        with pytest.raises(ValueError, match=r"gap <= 1 and length >= 1|tau must be"):
            AdaNeg(CLASSES, NEGATIVES, ada)
    for active in (TANLSettings(num_labels=0), TANLSettings(stride=-1)):
        with pytest.raises(ValueError, match="num_labels >= 1 and stride >= 0"):
            TANL(CLASSES, NEGATIVES, active)
