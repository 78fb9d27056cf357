"""Metrics of a classifier's confidence on ID images: its calibration, its risk if it abstains."""

import numpy as np

from pipelines.ood.metrics import auroc
from pipelines.ood.sides import correct_rows, one_side
from pipelines.ood.statistics import Values


def augrc(scores: Values, correct: Values) -> float:
    """Area under the generalised risk-coverage curve (Traub et al. 2024), at most 1 / 2.

    The generalised risk of a threshold is the share of ALL samples that are accepted and wrong;
    the area under it, over the share of samples that are accepted, is the mean risk of a system
    that abstains. With e the error rate and A the AUROC of right against wrong predictions it is
    e (1 - e) (1 - A) + e^2 / 2, ties counting half.

    Args:
        scores: (N,), high where the prediction is trusted.
        correct: bool (N,), whether the prediction is right.

    Raises:
        ValueError: Empty, NaN or inf, not boolean, or lengths that differ.
    """
    values = one_side(scores, "scores")
    right = correct_rows(correct, values.size)
    error = float(np.mean(~right))
    ranked = auroc(values[right], values[~right]) if 0 < error < 1 else 1.0
    return error * (1 - error) * (1 - ranked) + error**2 / 2


def expected_calibration_error(confidence: Values, correct: Values, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by their share.

    Naeini et al. 2015; Guo et al. 2017, eq. 3. Bins are (i/B, (i+1)/B].

    Args:
        confidence: (N,) probability of the predicted class.
        correct: bool (N,), whether the prediction is right.
        num_bins: B.

    Raises:
        ValueError: Empty, NaN, values outside [0, 1], not boolean, lengths that differ, or no bins.
    """
    values = one_side(confidence, "confidence")
    right = correct_rows(correct, values.size)
    # A softmax may exceed 1 by its last digits.
    if values.min() < 0 or values.max() > 1 + 1e-6 or num_bins < 1:
        raise ValueError(f"confidence must lie in [0, 1] and num_bins be >= 1, came {num_bins}")
    bins = np.clip(np.ceil(values * num_bins) - 1, 0, num_bins - 1)
    gaps = [
        abs(right[bins == b].mean() - values[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    ]
    return float(np.sum(gaps))
