"""Training losses of image classifiers: OECC, PASCL, Open-Sampling, logit adjustment.

The conventions of `pipelines.ood.losses` hold here too: scalars to be minimised, half precision
computed in float32, ValueError for what cannot be right. Where a paper and its authors' public
code differ, the code is followed. `pipelines.ood.LOSSES` lists these losses.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.ood.checks import (
    Array,
    as_batch,
    as_labels,
    as_tensor,
    check_positive,
    check_shares,
    share_memory,
    working_dtype,
)
from pipelines.ood.energy import log_prior

# Shares counted in float32 over many classes miss 1 by a few 1e-6; percentages miss it by 99.
_SUM_TOLERANCE = 1e-4


def confidence_control(id_logits: Array, train_accuracy: float) -> Tensor:
    """Sum over ID images of (max_k p_k - A)^2, p the softmax: holds confidence near accuracy A.

    Papadopoulos et al. 2021, "Outlier exposure with confidence control for out-of-distribution
    detection" (OECC), the first of its two terms beside cross-entropy. It is a sum of squares
    and no mean, as in the authors' code: its weight goes with the batch size (0.07 for 128
    images). The authors write of the average confidence, which alone would be the square of a
    mean; their code squares each image's difference.

    Args:
        id_logits: (N, K) of in-distribution images.
        train_accuracy: A, the baseline's accuracy on its training images, in [0, 1].
    """
    if not 0 <= train_accuracy <= 1:
        raise ValueError(f"train_accuracy must be a share in 0..1, came {train_accuracy}")
    # `max` passes the gradient of a tie to one class, as the authors' code does.
    confidence = as_batch(id_logits, "id_logits").softmax(dim=1).max(dim=1).values
    return (confidence - train_accuracy).square().sum()


def uniform_deviation(ood_logits: Array) -> Tensor:
    """Sum over outliers and classes of |p_k - 1/K|, p the softmax; 0 for a uniform softmax.

    Papadopoulos et al. 2021 (OECC), the second term: a sum and no mean, so its weight goes with
    the batch size (0.05 for 256 outliers). An outlier adds at most 2 (1 - 1/K), in contrast to
    the unbounded cross-entropy of `outlier_exposure`.

    Args:
        ood_logits: (M, K) of outliers.
    """
    probabilities = as_batch(ood_logits, "ood_logits").softmax(dim=1)
    return (probabilities - 1 / probabilities.shape[1]).abs().sum()


def tail_contrast(
    id_projections: Array,
    ood_projections: Array,
    *,
    labels: Array,
    tail_classes: Array,
    temperature: float = 0.07,
) -> Tensor:
    """Supervised contrastive loss of tail-class images; outliers serve as negatives only.

    Wang et al. 2022, "Partial and Asymmetric Contrastive Learning for Out-of-Distribution
    Detection in Long-Tailed Recognition" (PASCL), by its public code. An anchor is one view of
    one tail-class image and costs the mean over its positives q of
    -log(e^{a.q/T} / sum_c e^{a.c/T}). Positives are all other views of its class, those of its
    own image too; c runs over all other tail-class views and all outliers. Images of the other
    classes are not used, not even as negatives. The loss is the mean over the anchors, or 0
    (with zero gradients) where the batch has none.

    Args:
        id_projections: (N, V, D) of V >= 2 views of each ID image, unit length.
        ood_projections: (M, D) of outliers, one view each in the authors' code, unit length.
        labels: Class of each ID image, integer (N,).
        tail_classes: Whether each class is a tail class, boolean (K,).
        temperature: T, > 0.
    """
    check_positive(temperature, "temperature")
    images, outliers = _projections(id_projections, ood_projections)
    is_tail = _class_mask(tail_classes, "tail_classes").to(images.device)
    targets = as_labels(labels, "labels", num_rows=len(images), num_classes=len(is_tail))
    targets = targets.to(images.device)
    chosen = is_tail[targets]
    anchors = images[chosen].flatten(0, 1)
    classes = targets[chosen].repeat_interleave(images.shape[1])
    similarity = anchors @ torch.cat((anchors, outliers)).T / temperature
    itself = torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    log_shares = similarity.masked_fill(itself, -torch.inf).log_softmax(dim=1)
    count = len(anchors)
    positive = (classes[:, None] == classes) & ~itself[:, :count]
    costs = -log_shares[:, :count].masked_fill(~positive, 0.0).sum(dim=1) / positive.sum(dim=1)
    return costs.sum() / max(1, count)


def complementary_distribution(class_shares: Array) -> Tensor:
    """Label distribution of outliers, G_j = (max p + min p - p_j) / sum_k (max p + min p - p_k).

    Wei et al. 2022, "Open-Sampling: Exploring Out-of-Distribution Data for Re-balancing
    Long-Tailed Datasets": rare classes are drawn most, the most frequent one least; equal shares
    give the uniform distribution. A class of share max p is never drawn where another has none.

    Args:
        class_shares: p (K,), share of the training images in each class; they sum to 1.

    Returns:
        G (K,), which sums to 1.
    """
    shares = as_tensor(class_shares, "class_shares", rank=1)
    check_shares(shares, "class_shares")
    total = float(shares.double().sum())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(f"class_shares must sum to 1, came sum {total}")
    complement = shares.double().max() + shares.double().min() - shares.double()
    return (complement / complement.sum()).to(working_dtype(shares))


def draw_labels(distribution: Array, num_labels: int, *, generator: torch.Generator) -> Tensor:
    """Independent labels of outliers for one step, drawn from `distribution`.

    Args:
        distribution: (K,) shares of the classes, as `complementary_distribution` gives them.
        num_labels: M, the number of outliers, >= 1.
        generator: The only source of randomness; the labels lie on its device.

    Returns:
        Integer (M,).
    """
    if num_labels < 1:
        raise ValueError(f"num_labels must be >= 1, came {num_labels}")
    shares = as_tensor(distribution, "distribution", rank=1)
    check_shares(shares, "distribution")
    chances = shares.detach().to(generator.device, torch.float64)
    return torch.multinomial(chances, num_labels, replacement=True, generator=generator)


def open_sampling(ood_logits: Array, drawn_labels: Array, *, class_weights: Array) -> Tensor:
    """Weighted cross-entropy of outliers to drawn labels, sum_i w_{y_i} l_i / sum_i w_{y_i}.

    Wei et al. 2022 (Open-Sampling), with weights w = K G, G = `complementary_distribution`. The
    authors' code divides by the weights of the drawn labels (PyTorch's weighted mean), so only
    the ratios of the weights count: G itself gives the same loss.

    Args:
        ood_logits: f (M, K) of outliers; l_i = lse(f_i) - f_{i, y_i}.
        drawn_labels: y, integer (M,), drawn anew at each step (`draw_labels`).
        class_weights: w (K,), >= 0.
    """
    logits = as_batch(ood_logits, "ood_logits")
    rows, num_classes = logits.shape
    targets = as_labels(drawn_labels, "drawn_labels", num_rows=rows, num_classes=num_classes)
    targets = targets.to(logits.device)
    weights = as_tensor(class_weights, "class_weights", rank=1)
    check_shares(weights, "class_weights", num_classes=num_classes)
    drawn_weights = weights.to(logits)[targets]
    if not (drawn_weights > 0).any():
        raise ValueError("class_weights are 0 for every drawn label; one must be > 0")
    costs = -logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    return (drawn_weights * costs).sum() / drawn_weights.sum()


def adjusted_cross_entropy(
    id_logits: Array, labels: Array, class_prior: Array, tau: float = 1.0
) -> Tensor:
    """Mean cross-entropy of f + tau log p, p the classes' shares in training.

    Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 10; with tau = 1 stage 2 of
    Wang et al. 2022 (PASCL). The prior stands in the loss alone: the class of the largest f is
    then the one of least balanced error, and nothing is subtracted when f is judged.

    Args:
        id_logits: f (N, K) of in-distribution images.
        labels: Class of each image, integer (N,).
        class_prior: p (K,), all > 0; a common factor changes nothing.
        tau: Strength of the adjustment, >= 0; 0 is cross-entropy.
    """
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"tau must be a finite number >= 0, came {tau}")
    logits = as_batch(id_logits, "id_logits")
    rows, num_classes = logits.shape
    targets = as_labels(labels, "labels", num_rows=rows, num_classes=num_classes)
    log_shares = log_prior(class_prior, num_classes=num_classes)
    adjusted = logits + (tau * log_shares).to(logits)
    return F.cross_entropy(adjusted, targets.to(logits.device))


def _projections(id_projections: Array, ood_projections: Array) -> tuple[Tensor, Tensor]:
    """Both projections in one dtype, (N, V, D) with V >= 2 and (M, D)."""
    images = as_batch(id_projections, "id_projections", rank=3)
    outliers = as_batch(ood_projections, "ood_projections")
    if images.shape[1] < 2:  # an anchor that is alone in its class would have no positive
        raise ValueError(
            f"id_projections must hold at least 2 views of each image, "
            f"came shape {tuple(images.shape)}"
        )
    if images.shape[2] != outliers.shape[1]:
        raise ValueError(
            f"id_projections and ood_projections must have the same width, came shapes "
            f"{tuple(images.shape)} and {tuple(outliers.shape)}"
        )
    dtype = working_dtype(images, outliers)
    return images.to(dtype), outliers.to(dtype)


def _class_mask(values: Array, name: str) -> Tensor:
    """A boolean tensor of one entry per class, (K,)."""
    mask = share_memory(values)
    if mask.dtype != torch.bool or mask.ndim != 1 or len(mask) == 0:
        raise ValueError(
            f"{name} must be booleans of shape (K,), came {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask
