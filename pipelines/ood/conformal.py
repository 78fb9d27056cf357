"""Thresholds and p-values that promise how many known images are rejected (conformal inference).

What is promised is the false alarm rate, the share of ID images that are called out of
distribution, for images that come from the same source as the calibration images: both exchangeable
(Vovk et al. 2005). Nothing is promised of OOD images that are missed, nor of ID images from another
source, such as a shifted style. No assumption is made on the score, and equal scores only lower the
rate. Scores are HIGH for ID.

Vovk 2012, "Conditional validity of inductive conformal predictors"; Bates et al. 2021, "Testing for
outliers with conformal p-values".
"""

import math
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from pipelines.ood.curves import num_needed
from pipelines.ood.sides import one_side
from pipelines.ood.statistics import FloatArray, Values

# How a threshold follows from the scores of ID images.
ThresholdRule: TypeAlias = Literal["quantile", "conformal", "conformal_conditional"]

# 1 - 0.9 is 0.09999999999999998, of which ten images would be one too few.
_ROUNDING = 1e-9


def threshold_rank(
    num_images: int, tpr: float, rule: ThresholdRule = "quantile", confidence: float = 0.9
) -> int:
    """Which of the ID scores, in ascending order from 1, is the threshold; lower ones are rejected.

    With alpha = 1 - `tpr` and n images:

    - quantile: the largest rank that keeps the share `tpr` of these images. A new ID image is
      rejected with probability at most rank / (n + 1), which may exceed alpha.
    - conformal: floor(alpha (n + 1)). A new ID image is rejected with probability at most alpha, on
      average over calibration sets (Vovk et al. 2005).
    - conformal_conditional: the largest rank k with P(Binomial(n, alpha) >= k) >= `confidence`.
      With this probability over calibration sets, at most alpha of all ID images are rejected
      (Vovk 2012, proposition 2a; Bates et al. 2021, section 3).

    Args:
        num_images: n, at least 1.
        tpr: in (0, 1], or in (0, 1) for a promise.
        rule: see above.
        confidence: of conformal_conditional, in (0, 1).

    Raises:
        ValueError: there are too few images for the promise; it says how many are needed.
    """
    if rule not in get_args(ThresholdRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(ThresholdRule))}, came {rule!r}")
    if num_images < 1:
        raise ValueError("a threshold needs at least one score of an ID image")
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], came {tpr}")
    if rule == "quantile":
        return num_images - num_needed(num_images, tpr) + 1
    alpha = 1 - tpr
    if alpha == 0:
        raise ValueError("no threshold promises to reject no ID image: take a tpr below 1")
    if rule == "conformal":
        rank = math.floor(alpha * (num_images + 1) + _ROUNDING)
        needed = math.ceil(1 / alpha - 1 - _ROUNDING)
    else:
        from scipy.stats import binom  # half a second, for this rule alone

        _check_share(confidence, "confidence")
        rank = int((binom.sf(np.arange(num_images), num_images, alpha) >= confidence).sum())
        needed = math.ceil(math.log1p(-confidence) / math.log1p(-alpha))
    if rank < 1:
        raise ValueError(
            f"{num_images} ID images are too few to promise that at most {alpha:.3g} of the ID "
            f"images are rejected: {rule} needs {needed}"
        )
    return rank


def threshold(
    id_scores: Values, tpr: float, rule: ThresholdRule = "quantile", confidence: float = 0.9
) -> float:
    """The score of `threshold_rank` among ID scores (N,); with `quantile`, `threshold_at_tpr`.

    Raises:
        ValueError: as `threshold_rank`, or the scores are empty or hold NaN or inf.
    """
    scores = one_side(id_scores, "id_scores")
    rank = threshold_rank(scores.size, tpr, rule, confidence) - 1
    return float(np.partition(scores, rank)[rank])


def p_values(calibration: Values, scores: Values, confidence: float | None = None) -> FloatArray:
    """The conformal p-value (M,) of each score: small where few calibration scores are as low.

    Marginal: (1 + number of calibration scores <= score) / (n + 1). For a new ID image P(p <= t) is
    at most t, on average over calibration sets (Bates et al. 2021, eq. 2).

    With `confidence` 1 - delta, calibration-conditional: rank j gives no longer j / (n + 1) but the
    j-th bound of the generalised Simes inequality with k = n / 2,

        b_(n+1-i) = 1 - delta^(1/k) (i (i-1) ... (i-k+1) / (n (n-1) ... (n-k+1)))^(1/k)

    (Bates et al. 2021, section 3.2), so that P(p <= t) <= t holds for every t at once with
    probability `confidence` over calibration sets.

    Args:
        calibration: scores of ID images that nothing was trained or chosen on (N,).
        scores: of the images in question (M,).
        confidence: in (0, 1), or None.

    Raises:
        ValueError: a side is empty or holds NaN or inf.
    """
    ordered, questioned = np.sort(one_side(calibration, "calibration")), one_side(scores, "scores")
    ranks = 1 + np.searchsorted(ordered, questioned, side="right")
    size = ordered.size
    if confidence is None:
        return np.asarray(ranks / (size + 1), np.float64)
    return np.append(_simes_bounds(size, confidence), 1.0)[ranks - 1]


def _simes_bounds(size: int, confidence: float) -> FloatArray:
    """b_1 .. b_n: with `confidence`, n uniform numbers in ascending order lie below them."""
    from scipy.special import gammaln

    _check_share(confidence, "confidence")
    k = max(1, size // 2)
    left = np.arange(size, 0, -1)  # i of b_(n+1-i), for b_1 first
    enough = left >= k
    some = left[enough]
    products = gammaln(some + 1) - gammaln(some - k + 1) - gammaln(size + 1) + gammaln(size - k + 1)
    bounds = np.ones(size)
    bounds[enough] = 1 - np.exp((math.log1p(-confidence) + products) / k)
    return bounds


def unknown(p: Values, false_alarms: float) -> npt.NDArray[np.bool_]:
    """Which images of a batch are called unknown, by Benjamini and Hochberg (1995).

    Of the images that are called unknown, at most the share `false_alarms` is ID, on average. It
    holds for marginal conformal p-values, though they share one calibration set (Bates et al. 2021,
    theorem 2).

    Args:
        p: p-values (M,) of the batch, `p_values`.
        false_alarms: in (0, 1).

    Raises:
        ValueError: no p-value, one outside [0, 1], or `false_alarms` outside (0, 1).
    """
    from scipy.stats import false_discovery_control

    values = one_side(p, "p")
    _check_share(false_alarms, "false_alarms")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"p must lie in [0, 1], came {values.min():g} to {values.max():g}")
    return np.asarray(false_discovery_control(values) <= false_alarms)


def _check_share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie in (0, 1), came {value}")
