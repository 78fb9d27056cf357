"""Training losses: scalars to be minimised, differentiable in every floating-point input.

Energies are E = -tau * logsumexp(f / tau), LOW for in-distribution samples. Half-precision inputs
are computed in float32; float64 stays float64. Every function raises ValueError for inputs of the
wrong rank, empty batches, NaN or infinity (with their count and first row), and parameters out of
range.

`LOSSES`, at the foot, is the table that methods and tests iterate over; it lists the losses of
`pipelines.ood.classifier_losses` too.
"""

import math

import torch
from torch import Tensor

from pipelines.ood.checks import (
    Array,
    as_batch,
    as_labels,
    as_tensor,
    check_positive,
    check_shares,
    working_dtype,
)
from pipelines.ood.classifier_losses import (
    adjusted_cross_entropy,
    confidence_control,
    open_sampling,
    tail_contrast,
    uniform_deviation,
)
from pipelines.ood.energy import free_energy
from pipelines.ood.table import Entry, Table


def energy_margin(
    id_logits: Array, ood_logits: Array, m_in: float, m_out: float, tau: float = 1.0
) -> Tensor:
    """Two squared hinges, mean relu(E_id - m_in)^2 + mean relu(m_out - E_ood)^2.

    Liu et al. 2020, "Energy-based Out-of-distribution Detection", eq. 8-9. (Choi et al. 2023
    print the second term with its sign turned.) Margins from data: `suggest_margins`.

    Args:
        id_logits: (N, K) of in-distribution samples.
        ood_logits: (M, K) of outliers.
        m_in: Energy below which an ID sample costs nothing, m_in < m_out.
        m_out: Energy above which an outlier costs nothing.
        tau: Temperature, > 0.
    """
    _check_margins(m_in, m_out)
    id_energy = free_energy(as_batch(id_logits, "id_logits"), tau)
    ood_energy = free_energy(as_batch(ood_logits, "ood_logits"), tau)
    return (id_energy - m_in).relu().square().mean() + (m_out - ood_energy).relu().square().mean()


def energy_single_margin(id_logits: Array, ood_logits: Array, margin: float) -> Tensor:
    """One hinge on the batch means, relu(mean E_id - mean E_ood + margin), tau = 1.

    The ablation of Liu et al. 2020, footnote 2: it holds the gap, not the values.

    Args:
        id_logits: (N, K) of in-distribution samples.
        ood_logits: (M, K) of outliers.
        margin: Gap between the mean energies at which the loss is zero, finite.
    """
    _check_number(margin, "margin")
    id_energy = free_energy(as_batch(id_logits, "id_logits"))
    ood_energy = free_energy(as_batch(ood_logits, "ood_logits"))
    return (id_energy.mean() - ood_energy.mean() + margin).relu()


def balance_weight(logits: Array, prior: Array, gamma: float) -> Tensor:
    """Z = sum_j softmax(f)_j P_gamma(j), with P_gamma = prior^gamma / sum_j prior_j^gamma.

    Choi et al. 2023, "Balanced Energy Regularization Loss for OOD Detection", term Z_gamma: large
    for outliers that look like the classes most outliers look like. Not detached.

    Args:
        logits: f (N, K) of outliers.
        prior: (K,) share of outliers predicted as each class (`pipelines.ood.prior`); zeros are
            allowed, with 0^0 = 1.
        gamma: Exponent, >= 0; 0 makes Z = 1 / K.

    Returns:
        (N,), each in [0, 1].
    """
    return _log_balance_weight(as_batch(logits, "logits"), prior, gamma).exp()


def balanced_energy_margin(
    id_logits: Array,
    ood_logits: Array,
    prior: Array,
    m_in: float,
    m_out: float,
    alpha: float,
    gamma: float,
    tau: float = 1.0,
    reduction: str = "weighted",
) -> Tensor:
    """Energy margins that press harder on outliers of the majority classes.

    mean relu(E_id - m_in)^2 + sum_i Z_i relu(m_out + alpha Z_i - E_i)^2 / sum_i Z_i over the
    outliers, Z = `balance_weight`. Choi et al. 2023, eq. 8, with the weighted mean of its public
    code. alpha = gamma = 0 is `energy_margin`.

    Args:
        id_logits: (N, K) of in-distribution samples.
        ood_logits: (M, K) of outliers.
        prior: (K,) share of outliers predicted as each class.
        m_in: Energy below which an ID sample costs nothing, m_in < m_out.
        m_out: Energy above which an outlier costs nothing, before alpha * Z is added.
        alpha: Widening of the outlier margin, >= 0.
        gamma: Exponent of the prior, >= 0.
        tau: Temperature of the energies, > 0 (Z keeps temperature 1).
        reduction: `weighted` (above), or `mean`: the plain mean of Z * relu^2, as the paper's
            equation has it.
    """
    _check_margins(m_in, m_out)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number >= 0, came {alpha}")
    if reduction not in ("weighted", "mean"):
        raise ValueError(f"reduction must be 'weighted' or 'mean', came {reduction!r}")
    outliers = as_batch(ood_logits, "ood_logits")
    log_weight = _log_balance_weight(outliers, prior, gamma)
    weight = log_weight.exp()
    id_energy = free_energy(as_batch(id_logits, "id_logits"), tau)
    penalty = (m_out + alpha * weight - free_energy(outliers, tau)).relu().square()
    # Z / sum Z as a softmax of log Z: no 0 / 0 where every Z underflows.
    share = log_weight.softmax(dim=0) if reduction == "weighted" else weight / len(weight)
    return (id_energy - m_in).relu().square().mean() + (share * penalty).sum()


def outlier_exposure(ood_logits: Array) -> Tensor:
    """Mean cross-entropy of outliers to the uniform distribution, mean_i [lse(f_i) - mean_k f_ik].

    Hendrycks et al. 2019, "Deep Anomaly Detection with Outlier Exposure"; at least log K.

    Args:
        ood_logits: f (N, K) of outliers.
    """
    return -as_batch(ood_logits, "ood_logits").log_softmax(dim=1).mean()


def delta_energy_bound(
    image_features: Array,
    text_features: Array,
    labels: Array,
    tau: float,
    keep: float,
    scope: str,
) -> Tensor:
    """Mean of E0 - E2: minimising it raises E2 - E0, a lower bound of DeltaEnergy.

    What Zhu et al. (DeltaEnergy) imply by "lower-bound maximization" (Theorem 3.5); they do not
    print the loss. It is minus the mean of `masked_energy_change`, which has the arguments. With
    keep = 1 it is exactly 0, the trivial optimum: never choose a model by this loss. Where
    E2 - E0 is negative the loss acts as consistency between masked and unmasked features.
    """
    return -masked_energy_change(image_features, text_features, labels, tau, keep, scope).mean()


def masked_energy_change(
    image_features: Array,
    text_features: Array,
    labels: Array,
    tau: float,
    keep: float,
    scope: str,
) -> Tensor:
    """E2 - E0 of each sample: the energy change when part of the image feature is masked.

    With s_k = z . h_k and y the label, the mask m' keeps the max(1, round(keep * D)) largest
    entries of z * h_y; it is detached and z * m' is not normalised again.
    E0 = -log sum_k e^{s_k/tau}, E2 = -log sum_k e^{s'_k/tau}.

    Args:
        image_features: z (N, D), normalised.
        text_features: h (K, D), normalised.
        labels: Class of each sample, integer (N,).
        tau: Temperature, > 0.
        keep: Share of entries kept, 0 < keep <= 1; 1 gives exactly 0.
        scope: `image`: s'_k = (z * m') . h_k for every class, the masked domain S' of Theorem
            3.5; it carries no inequality. `top`: only s'_y is masked; if then s'_y >= 0 and y is
            the class of the largest similarity, DeltaEnergy(c=1, low=0) >= E2 - E0.

    Returns:
        (N,); its positive share is worth logging.
    """
    check_positive(tau, "tau")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be > 0 and <= 1, came {keep}")
    if scope not in ("image", "top"):
        raise ValueError(f"scope must be 'image' or 'top', came {scope!r}")
    images, texts = _features(image_features, text_features)
    targets = as_labels(labels, "labels", num_rows=len(images), num_classes=len(texts))
    targets = targets.to(images.device)
    similarity = images @ texts.T
    # What the mask drops is subtracted, so that keep = 1 leaves every similarity bit for bit.
    dropped = images * _dropped_entries(images, texts[targets], keep)
    if scope == "image":
        masked = similarity - dropped @ texts.T
    else:
        change = (dropped * texts[targets]).sum(dim=1, keepdim=True)
        masked = similarity.scatter_add(1, targets[:, None], -change)
    return (similarity / tau).logsumexp(dim=1) - (masked / tau).logsumexp(dim=1)


def _dropped_entries(images: Tensor, own_texts: Tensor, keep: float) -> Tensor:
    """Ones where an entry of z * h_y is not among the largest share `keep`, (N, D), detached."""
    product = (images * own_texts).detach()
    num_kept = max(1, round(keep * product.shape[1]))
    return torch.ones_like(product).scatter_(1, product.topk(num_kept, dim=1).indices, 0.0)


def _log_balance_weight(logits: Tensor, prior: Array, gamma: float) -> Tensor:
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a finite number >= 0, came {gamma}")
    shares = as_tensor(prior, "prior", rank=1)
    check_shares(shares, "prior", num_classes=logits.shape[1])
    powers = (shares.double() / shares.double().sum()).pow(gamma)
    log_powers = (powers / powers.sum()).log().to(logits)
    return (logits.log_softmax(dim=1) + log_powers).logsumexp(dim=1)


def _features(image_features: Array, text_features: Array) -> tuple[Tensor, Tensor]:
    images = as_batch(image_features, "image_features")
    texts = as_batch(text_features, "text_features")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"image_features and text_features must have the same width, came shapes "
            f"{tuple(images.shape)} and {tuple(texts.shape)}"
        )
    dtype = working_dtype(images, texts)
    return images.to(dtype), texts.to(dtype)


def _check_number(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, came {value}")


def _check_margins(m_in: float, m_out: float) -> None:
    _check_number(m_in, "m_in")
    _check_number(m_out, "m_out")
    if m_in >= m_out:
        raise ValueError(
            f"m_in must be below m_out (energies are low for ID samples), came m_in = {m_in} and "
            f"m_out = {m_out}"
        )


LOSSES: Table[Entry] = Table(
    {
        "energy_margin": Entry(energy_margin, ("id_logits", "ood_logits")),
        "energy_single_margin": Entry(energy_single_margin, ("id_logits", "ood_logits")),
        "balanced_energy_margin": Entry(
            balanced_energy_margin, ("id_logits", "ood_logits", "prior")
        ),
        "outlier_exposure": Entry(outlier_exposure, ("ood_logits",)),
        "delta_energy_bound": Entry(
            delta_energy_bound, ("image_features", "text_features", "labels")
        ),
        "confidence_control": Entry(confidence_control, ("id_logits",)),
        "uniform_deviation": Entry(uniform_deviation, ("ood_logits",)),
        "tail_contrast": Entry(
            tail_contrast, ("id_projections", "ood_projections", "labels", "tail_classes")
        ),
        "open_sampling": Entry(open_sampling, ("ood_logits", "drawn_labels", "class_weights")),
        "adjusted_cross_entropy": Entry(
            adjusted_cross_entropy, ("id_logits", "labels", "class_prior")
        ),
    }
)
