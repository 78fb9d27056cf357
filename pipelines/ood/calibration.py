"""Temperature scaling: one number that makes a softmax as sure as it is right."""

import torch
from torch import Tensor

from pipelines.ood.checks import Array, as_tensor
from pipelines.ood.statistics import Values, class_labels

# Where the best temperature is looked for; logits that separate all classes ask for 0.
LOWEST, HIGHEST = 1e-3, 1e3


def fit_temperature(logits: Array, labels: Values) -> float:
    """T > 0 with the least mean -log softmax(f / T)_y.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. The loss is convex in
    1/T, and its slope there, E_softmax(f/T)[f] - f_y, is found to be zero by bisection and secants.
    No prediction changes.

    Args:
        logits: f (N, K).
        labels: y (N,), classes in [0, K).

    Returns:
        T, at most `HIGHEST` and at least `LOWEST`.

    Raises:
        ValueError: no rows, shapes that do not fit, NaN, or a label outside [0, K).
    """
    from scipy.optimize import brentq  # 0.3 s, which the record of a finished run need not wait for

    rows = as_tensor(logits, "logits", rank=2).detach().double()
    known = class_labels(labels, rows.shape[1]).to(rows.device)
    if not len(rows) or len(known) != len(rows):
        raise ValueError(f"{len(rows)} rows of logits and {len(known)} labels")
    right = rows.gather(1, known[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected: Tensor = (torch.softmax(rows * inverse, dim=1) * rows).sum(dim=1)
        return float((expected - right).mean())

    if slope(1 / HIGHEST) >= 0:
        return HIGHEST
    if slope(1 / LOWEST) <= 0:
        return LOWEST
    return float(1 / brentq(slope, 1 / HIGHEST, 1 / LOWEST, xtol=1e-12))
