"""Free energy, and the margins and class priors that energy-based losses are set by.

The energy is LOW for in-distribution samples; the score `pipelines.ood.scores.energy` is its
negative. Dtypes and errors: see `pipelines.ood.checks`.
"""

import warnings

import torch
from torch import Tensor

from pipelines.ood.checks import (
    Array,
    as_tensor,
    check_finite,
    check_positive,
    check_shares,
    map_rows,
    share_memory,
    working_dtype,
)


def free_energy(logits: Array, tau: float = 1.0) -> Tensor:
    """Helmholtz free energy E = -tau * logsumexp(f / tau), low for in-distribution samples.

    Liu et al. 2020, "Energy-based Out-of-distribution Detection", eq. 4.

    Args:
        logits: f (N, K); half precision is computed in float32.
        tau: Temperature, > 0.

    Returns:
        (N,), float64 for float64 input, else float32.

    Raises:
        ValueError: `logits` is not (N, K) with K >= 1 or holds NaN or infinity, or tau <= 0.
    """
    check_positive(tau, "tau")
    return map_rows(
        lambda block: -tau * torch.logsumexp(block / tau, dim=1),
        logits=as_tensor(logits, "logits", rank=2),
    )


def suggest_margins(id_energy: Array, ood_energy: Array) -> tuple[float, float]:
    """Margins (m_in, m_out) from data: the mean energies of ID samples and of outliers.

    Liu et al. 2020, section 4.1, place the margins around these means. Published values belong
    to the logits of one network, so this is the default wherever none are given.

    Args:
        id_energy: Energies (N,) of in-distribution samples under the pretrained model.
        ood_energy: Energies (M,) of outliers under the same model.

    Returns:
        The two means in ascending order, m_in < m_out. If the outliers have the lower mean, a
        RuntimeWarning says that the pretrained energies are inverted.

    Raises:
        ValueError: A side is empty, not (N,), or holds NaN or infinity, or the means are equal.
    """
    m_in, m_out = _mean(id_energy, "id_energy"), _mean(ood_energy, "ood_energy")
    if m_in == m_out:
        raise ValueError(
            f"the mean energies of ID samples and outliers are equal ({m_in}): no margin lies "
            f"between them; give m_in and m_out"
        )
    if m_in > m_out:
        warnings.warn(
            f"the pretrained energies are inverted: outliers have a lower mean energy ({m_out:.6g})"
            f" than ID samples ({m_in:.6g}); the margins are their means in ascending order",
            RuntimeWarning,
            stacklevel=2,
        )
    return min(m_in, m_out), max(m_in, m_out)


def outlier_counts(ood_logits: Array) -> Tensor:
    """Number of outliers that a pretrained model predicts as each class.

    Choi et al. 2023, "Balanced Energy Regularization Loss for OOD Detection", Algorithm 1, Step 1
    (N_i). Counts of shards add up to the counts of the whole.

    Args:
        ood_logits: (N, K).

    Returns:
        int64 (K,); zeros if N = 0.

    Raises:
        ValueError: `ood_logits` is not (N, K) with K >= 1, or holds NaN or infinity.
    """
    logits = as_tensor(ood_logits, "ood_logits", rank=2)
    check_finite(logits, "ood_logits")
    return torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1])


def prior(counts: Array) -> Tensor:
    """Share of outliers predicted as each class, P(y = i | o) = N_i / sum_j N_j.

    Choi et al. 2023, Algorithm 1, Step 1. A class with no outlier has prior 0.

    Args:
        counts: (K,) non-negative counts, integer or floating-point.

    Returns:
        float64 (K,), sums to 1.

    Raises:
        ValueError: `counts` is not (K,) with K >= 1, a count is negative or not finite, or all
            are zero.
    """
    shares = as_tensor(share_memory(counts).double(), "counts", rank=1)
    check_shares(shares, "counts")
    return shares / shares.sum()


def adjust_logits(logits: Array, class_prior: Array, tau: float = 1.0) -> Tensor:
    """Logits for the predicted class of a model trained on a long tail: f - tau * log prior.

    Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 9 (post-hoc form); the row
    "AdjLogit" of Choi et al. 2023. Scores use the unadjusted logits.

    Args:
        logits: f (N, K).
        class_prior: (K,) share of each class in the training set, all > 0; a common factor moves
            every logit alike.
        tau: Strength of the adjustment, > 0.

    Returns:
        (N, K).

    Raises:
        ValueError: Shapes do not fit, a value is not finite, a prior is not > 0, or tau <= 0.
    """
    check_positive(tau, "tau")
    values = as_tensor(logits, "logits", rank=2)
    log_shares = log_prior(class_prior, num_classes=values.shape[1])
    check_finite(values, "logits")
    values = values.to(working_dtype(values))
    return values - (tau * log_shares).to(values)


def log_prior(class_prior: Array, *, num_classes: int) -> Tensor:
    """The logarithm of the classes' shares in training, log p_k, float64 (K,).

    Args:
        class_prior: p (K,), all > 0; a common factor adds a constant.
        num_classes: K.

    Raises:
        ValueError: The shape is not (K,), or a share is not finite or not > 0.
    """
    shares = as_tensor(class_prior, "class_prior", rank=1)
    check_shares(shares, "class_prior", num_classes=num_classes)
    if (shares == 0).any():
        raise ValueError(
            f"class_prior must be > 0 for every class, came 0 for class "
            f"{int((shares == 0).nonzero()[0, 0])}"
        )
    return shares.double().log()


def _mean(energy: Array, name: str) -> float:
    values = as_tensor(energy, name, rank=1)
    if values.shape[0] == 0:
        raise ValueError(f"{name} is empty; at least one energy is needed")
    check_finite(values, name)
    return float(values.detach().mean(dtype=torch.float64))
