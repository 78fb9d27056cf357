"""Scores of patches against loops over single patches in arbitrary precision."""

import pytest
import torch

from pipelines.ood import SCORES, gl_mcm, mcm
from pipelines.ood.patches import PATCH_SCORES, patch_scores
from tests.ood import oracles

SHAPES = [(1, 1, 1), (3, 4, 7), (2, 36, 5), (2, 9, 101)]


def cosines(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
    return 2 * values - 1


@pytest.mark.parametrize(
    ("score", "params", "scale"),
    [
        ("mcm", {"tau": 0.37}, 1.0),
        ("delta_energy", {"tau": 0.2, "c": 2}, 1.0),
        ("delta_energy", {"tau": 0.05, "c": 1, "low": 0.1}, 1.0),
        ("energy", {"tau": 2.0}, 11.5),
        ("msp", {}, 11.5),
        ("max_logit", {}, 11.5),
    ],
)
def test_each_patch_has_the_score_of_its_own_row(
    score: str, params: dict[str, float], scale: float
) -> None:
    local = cosines(3, 4, 7)
    found = patch_scores(local, score, logit_scale=scale, **params)
    assert found.shape == (3, 4)
    oracle = {"mcm": oracles.msp}.get(score) or getattr(oracles, score)
    for image in range(3):
        for patch in range(4):
            row = [scale * value for value in local[image, patch].tolist()]
            assert found[image, patch].item() == pytest.approx(oracle(row, **params), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 0.3, 0.01])
def test_the_global_part_and_the_largest_patch_are_gl_mcm_bit_for_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, tau: float
) -> None:
    local = cosines(*shape, dtype=dtype)
    whole = cosines(shape[0], shape[2], dtype=dtype)
    parts = mcm(whole, tau) + 0.7 * patch_scores(local, tau=tau).amax(dim=1)
    assert torch.equal(gl_mcm(whole, local, tau, 0.7), parts)


def test_every_score_of_similarities_or_logits_has_a_value_for_a_patch() -> None:
    plain = {n for n, e in SCORES.items() if set(e.inputs) <= {"similarity", "logits"}}
    assert set(PATCH_SCORES) == {*plain, "gl_mcm"}
    for name in PATCH_SCORES:
        assert patch_scores(cosines(2, 4, 3), name).isfinite().all()


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"score 'neg_label' has no value for a patch; allowed: "):
        patch_scores(cosines(2, 4, 3), "neg_label")
    with pytest.raises(ValueError, match="local_similarity"):
        patch_scores(cosines(4, 3))
    with pytest.raises(ValueError, match="logit_scale"):
        patch_scores(cosines(2, 4, 3), logit_scale=0.0)
    broken = cosines(2, 4, 3)
    broken[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        patch_scores(broken)
