"""Scores of an image's patches: where in the image it is like the known classes.

Miyai et al. 2023, "Zero-Shot In-Distribution Detection in Multi-Object Settings Using
Vision-Language Foundation Models", take the largest softmax probability of any patch as the local
part of GL-MCM; DeltaEnergy (Zhu et al.) and the other scores of similarities or logits are
computed of a patch as of an image.
"""

from torch import Tensor

from pipelines.ood.checks import Array, as_tensor, check_positive
from pipelines.ood.scores import SCORES
from pipelines.ood.table import Table

# The scores that a patch can have by itself, by the name of the score of an image: its own, and
# of GL-MCM the part that is the maximum over patches.
PATCH_SCORES: Table[str] = Table(
    {
        **{name: name for name, e in SCORES.items() if e.inputs in (("similarity",), ("logits",))},
        "gl_mcm": "mcm",
    }
)


def patch_scores(
    local_similarity: Array, score: str = "gl_mcm", *, logit_scale: float = 1.0, **params: float
) -> Tensor:
    """The score of every patch, HIGH where it is like a known class.

    With `s` the similarities of whole images, `gl_mcm(s, local_similarity, tau, weight)` is
    `mcm(s, tau) + weight * patch_scores(local_similarity, tau=tau).amax(dim=1)`.

    Args:
        local_similarity: (N, P, K) of the P patches of each image with K classes.
        score: One of `PATCH_SCORES`.
        logit_scale: Logits of a patch are its similarities times this; > 0.
        params: Of the score (tau, c ...).

    Returns:
        (N, P).

    Raises:
        ValueError: For another score, an array that is not (N, P, K), and all that the score
            itself refuses.
    """
    if score not in PATCH_SCORES:
        raise ValueError(
            f"score {score!r} has no value for a patch; allowed: {', '.join(PATCH_SCORES)}"
        )
    check_positive(logit_scale, "logit_scale")
    local = as_tensor(local_similarity, "local_similarity", rank=3)
    rows = local.flatten(0, 1)
    scores = SCORES[PATCH_SCORES[score]](similarity=rows, logits=rows * logit_scale, **params)
    return scores.reshape(local.shape[0], local.shape[1])
