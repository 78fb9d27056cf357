"""Scores: HIGH for in-distribution samples, always; `is_ood = score < threshold`.

Each function takes a similarity s (N, K), the cosines of normalised image and text features, or
logits f (N, K), and returns (N,). Float64 input gives float64 scores; any other input is computed
in at least float32 and gives float32 scores. Cast half-precision features up before taking their
similarities: MCM at tau = 1 varies in the fifth digit, so half-precision scores tie and move FPR
by points. Inputs are read in blocks of rows that stay in the cache, so a score adds next to
nothing to the memory of its input. All scores are differentiable.

Every function raises ValueError for an input of the wrong rank or without a class, for NaN or
infinity (with their count and first row), and for parameters out of range.

`SCORES`, at the foot, is the table that config, sweeps and tests iterate over.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.ood.checks import (
    Array,
    as_tensor,
    check_finite,
    check_positive,
    finite_blocks,
    map_rows,
    working_dtype,
)
from pipelines.ood.energy import free_energy
from pipelines.ood.ranking import log_rest, top_values
from pipelines.ood.table import Entry, Table

Reduced = TypeVar("Reduced")


def msp(logits: Array, tau: float = 1.0) -> Tensor:
    """Maximum softmax probability, max_k softmax(f / tau)_k.

    Hendrycks & Gimpel 2017, "A Baseline for Detecting Misclassified and Out-of-Distribution
    Examples in Neural Networks".
    """
    check_positive(tau, "tau")
    return map_rows(
        lambda block: max_softmax(block, tau), logits=as_tensor(logits, "logits", rank=2)
    )


def max_logit(logits: Array) -> Tensor:
    """Largest logit, max_k f_k.

    Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings".
    """
    return map_rows(lambda block: block.amax(dim=1), logits=as_tensor(logits, "logits", rank=2))


def energy(logits: Array, tau: float = 1.0) -> Tensor:
    """Negative free energy, tau * logsumexp(f / tau).

    Liu et al. 2020, "Energy-based Out-of-distribution Detection", eq. 4 and 6.
    """
    return -free_energy(logits, tau)


def neg_entropy(logits: Array, tau: float = 1.0) -> Tensor:
    """Negative entropy of the softmax, sum_k p_k log p_k with p = softmax(f / tau), in nats.

    It lies in [-log K, 0]. Both of its parts are taken relative to the top class, so that it
    keeps its relative accuracy where one class holds nearly all of the probability.
    """
    check_positive(tau, "tau")
    return map_rows(
        lambda block: _neg_entropy(block, tau), logits=as_tensor(logits, "logits", rank=2)
    )


def gen(logits: Array, gamma: float = 0.1, top_m: int = 100) -> Tensor:
    """Generalised entropy, -sum over the `top_m` largest p of p^gamma (1 - p)^gamma.

    Liu et al. 2023, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection".
    1 - p of the top class is summed from the other classes: in float32 the difference is zero
    from p = 1 - 6e-8 on, where the term is still 0.19 at gamma = 0.1.

    Args:
        logits: f (N, K).
        gamma: Exponent, > 0; the paper takes it in (0, 1).
        top_m: Number of classes in the sum, >= 1; all of them if it exceeds K.
    """
    check_positive(gamma, "gamma")
    if top_m < 1:
        raise ValueError(f"top_m must be >= 1, came {top_m}")
    return map_rows(
        lambda block: _gen(block, gamma, top_m), logits=as_tensor(logits, "logits", rank=2)
    )


def mcm(similarity: Array, tau: float = 1.0) -> Tensor:
    """Maximum concept matching, max_k softmax(s / tau)_k on raw cosines without logit scale.

    Ming et al. 2022, "Delving into Out-of-Distribution Detection with Vision-Language
    Representations"; Zhu et al. (DeltaEnergy), Theorem 3.3.
    """
    check_positive(tau, "tau")
    return map_rows(
        lambda block: max_softmax(block, tau),
        similarity=as_tensor(similarity, "similarity", rank=2),
    )


def gl_mcm(
    similarity: Array, local_similarity: Array, tau: float = 1.0, weight: float = 1.0
) -> Tensor:
    """Global-local MCM: mcm + weight * max over patches and classes of softmax_k(s_local / tau).

    Miyai et al. 2023, "Zero-Shot In-Distribution Detection in Multi-Object Settings Using
    Vision-Language Foundation Models".

    Args:
        similarity: s (N, K) of the whole image.
        local_similarity: s_local (N, P, K) of its P patches.
        tau: Temperature, > 0.
        weight: Weight of the local part, finite.
    """
    check_positive(tau, "tau")
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite, came {weight}")
    whole = as_tensor(similarity, "similarity", rank=2)
    local = as_tensor(local_similarity, "local_similarity", rank=3)
    if whole.shape[1] != local.shape[2]:
        raise ValueError(
            f"local_similarity must have the {whole.shape[1]} classes of similarity, came shape "
            f"{tuple(local.shape)}"
        )
    return map_rows(
        lambda s, patches: max_softmax(s, tau) + weight * max_softmax(patches, tau).amax(dim=1),
        similarity=whole,
        local_similarity=local,
    )


def neg_label(
    similarity: Array, negative_similarity: Array, tau: float = 0.01, groups: int = 1
) -> Tensor:
    """Share of the ID labels, sum_id e^{s/tau} / (sum_id e^{s/tau} + sum_neg e^{s/tau}).

    Jiang et al. 2024, "Negative Label Guided OOD Detection with Pretrained Vision-Language
    Models". With `groups` > 1 the mean of that share over groups of the negative words (its
    grouping strategy, 100 groups in the public code): word m is in group m mod `groups`, so
    groups of words in the order of their distance are alike, and none is left out, where the
    public code draws groups at random and drops what is left over.

    Args:
        similarity: s (N, K) to the ID class names.
        negative_similarity: s (N, M) to the negative words, M >= 1.
        tau: Temperature, > 0.
        groups: a whole number from 1 to M.

    Returns:
        (N,) in [0, 1], float64 whatever the input: most ID images lie within 1e-7 of 1. Of float32
        input the exponentials and their sum are float32, and the odds share / (1 - share) keep a
        relative error below 1e-5.
    """
    check_positive(tau, "tau")
    num_words = as_tensor(negative_similarity, "negative_similarity", rank=2).shape[1]
    if groups != int(groups) or not 1 <= groups <= num_words:
        raise ValueError(
            f"groups must be a whole number from 1 to the number of negative words ({num_words}), "
            f"came {groups}"
        )
    return map_rows(
        lambda s, negative: _id_share(s, negative, tau, int(groups)),
        result_dtype=torch.float64,
        similarity=as_tensor(similarity, "similarity", rank=2),
        negative_similarity=as_tensor(negative_similarity, "negative_similarity", rank=2),
    )


def neg_mcm(similarity: Array, negative_similarity: Array, tau: float = 1.0) -> Tensor:
    """MCM among classes and negatives, max_id e^{s/tau} / (sum_id e^{s/tau} + sum_neg e^{s/tau}).

    Li et al. 2024, "Learning Transferable Negative Prompts for Out-of-Distribution Detection", as
    its public code has it: s (N, K) to the classes, (N, M) to negative prompts or words, tau > 0.
    """
    check_positive(tau, "tau")
    return map_rows(
        lambda s, negative: max_softmax(s, tau) * _id_share(s, negative, tau, 1).to(s),
        similarity=as_tensor(similarity, "similarity", rank=2),
        negative_similarity=as_tensor(negative_similarity, "negative_similarity", rank=2),
    )


def delta_energy(similarity: Array, tau: float = 1.0, c: int = 1, low: float = 0.0) -> Tensor:
    """Energy change E1 - E0 when the top c similarities are set to `low`, one at a time.

    Zhu et al., "DeltaEnergy: Optimizing Energy Change During Vision-Language Alignment Improves
    both OOD Detection and OOD Generalization", eq. 1-3. With y_j the class of the j-th largest
    similarity:

        E0 = -log sum_k e^{s_k/tau}
        E1 = -(1/c) sum_{j<=c} log[ e^{low/tau} + sum_{n != y_j} e^{s_n/tau} ]

    It is not a joint replacement: each of the c energies has one class set to `low`.

    Neither energy is computed. With u_k = e^{s_k/tau}, l = e^{low/tau} and R_j the sum of u over
    the classes other than y_j, the score is the mean over j of log1p((u_j - l) / (l + R_j)), each
    term in float64; only the sum over the K classes runs in the input's dtype. The relative error
    of each term stays below 1e-10 for float64 input and 1e-5 for float32 input at any tau.

    Args:
        similarity: s (N, K).
        tau: Temperature, > 0.
        c: Number of re-aligned similarities, 1 <= c <= K.
        low: The value they are set to; 0 in the paper.

    Returns:
        (N,), higher for in-distribution samples; negative where the top similarities lie below
        `low`.
    """
    values = as_tensor(similarity, "similarity", rank=2)
    _check_re_alignment(values, [tau], [c], low)

    return map_rows(
        lambda block: _energy_changes(block, *top_values(block, c), tau, low).mean(dim=1),
        similarity=values,
    )


@overload
def delta_energy_grid(
    similarity: Array, taus: Sequence[float], cs: Sequence[int], reduce: None = None
) -> Tensor: ...


@overload
def delta_energy_grid(
    similarity: Array,
    taus: Sequence[float],
    cs: Sequence[int],
    reduce: Callable[[Tensor], Reduced],
) -> list[list[Reduced]]: ...


def delta_energy_grid(
    similarity: Array,
    taus: Sequence[float],
    cs: Sequence[int],
    reduce: Callable[[Tensor], Reduced] | None = None,
) -> Tensor | list[list[Reduced]]:
    """`delta_energy` (low = 0) at every temperature and every c, in a fraction of the time.

    The top similarities are searched for once, and one pass per temperature serves all c: the
    term of the j-th class does not depend on c, so each c is a running mean of terms.

    Args:
        similarity: s (N, K).
        taus: T temperatures, each > 0.
        cs: C numbers of re-aligned similarities, each 1 <= c <= K.
        reduce: Called with the (N,) scores of each cell; only one temperature's scores are then
            held at a time.

    Returns:
        (T, C, N); with `reduce`, its T x C results as nested lists.
    """
    values = as_tensor(similarity, "similarity", rank=2)
    _check_re_alignment(values, taus, cs, 0.0)
    dtype, num_top = working_dtype(values), max(cs)
    blocks = list(finite_blocks(similarity=values))
    tops = [top_values(block.to(dtype), num_top) for (block,) in blocks]
    chosen = torch.tensor(cs, device=values.device) - 1

    def scores_at(tau: float) -> Tensor:
        cells = []
        for (block,), (top, index) in zip(blocks, tops, strict=True):
            changes = _energy_changes(block.to(dtype), top, index, tau, 0.0)
            counts = torch.arange(1, changes.shape[1] + 1, device=changes.device)
            cells.append((changes.cumsum(dim=1) / counts)[:, chosen].T.to(dtype))
        return torch.cat(cells, dim=1)

    if reduce is not None:
        return [[reduce(scores) for scores in scores_at(tau)] for tau in taus]
    grid = torch.empty(len(taus), len(cs), len(values), dtype=dtype, device=values.device)
    for row, tau in zip(grid, taus, strict=True):
        row.copy_(scores_at(tau))
    return grid


def combine(scores: Array, mean: Array, std: Array) -> Tensor:
    """Sum of z-normalised scores, sum_m (score_m - mean_m) / std_m.

    Args:
        scores: (N, M), one column per score, each higher for in-distribution samples.
        mean: (M,) means of the scores over the whole training set.
        std: (M,) their standard deviations, > 0.
    """
    values = as_tensor(scores, "scores", rank=2)
    centre, scale = as_tensor(mean, "mean", rank=1), as_tensor(std, "std", rank=1)
    for statistic, name in ((centre, "mean"), (scale, "std")):
        if statistic.shape[0] != values.shape[1]:
            raise ValueError(
                f"{name} must have shape ({values.shape[1]},), one per score, came "
                f"{tuple(statistic.shape)}"
            )
        check_finite(statistic, name)
    if (scale <= 0).any():
        raise ValueError(f"std must be > 0 for every score, came minimum {float(scale.min())}")
    return map_rows(
        lambda block: ((block - centre.to(block)) / scale.to(block)).sum(dim=1), scores=values
    )


def max_softmax(x: Tensor, tau: float) -> Tensor:
    """Largest softmax probability over the last dimension."""
    return 1 / ((x - x.amax(dim=-1, keepdim=True)) / tau).exp().sum(dim=-1)


def _id_share(similarity: Tensor, negative: Tensor, tau: float, groups: int) -> Tensor:
    """(B,) in float64: the logistic function of two logarithms, of which neither underflows."""
    if groups == 1:
        return torch.sigmoid(_log_sum(similarity, tau) - _log_sum(negative, tau))
    missing = -negative.shape[1] % groups
    if missing:  # filled up with words that are too far to count
        negative = F.pad(negative, (0, missing), value=-math.inf)
    of_groups = _log_sum(negative.reshape(len(negative), -1, groups), tau)
    return torch.sigmoid(_log_sum(similarity, tau)[:, None] - of_groups).mean(dim=1)


def _log_sum(values: Tensor, tau: float) -> Tensor:
    """Log sum e^{v/tau} over the second dimension, in float64; the sum itself keeps the dtype."""
    largest = values.amax(dim=1, keepdim=True)
    total = (values - largest).div_(tau).exp_().sum(dim=1)
    return total.double().log() + largest.squeeze(1).double() / tau


def _energy_changes(block: Tensor, top: Tensor, index: Tensor, tau: float, low: float) -> Tensor:
    """log[(u_j + R_j) / (l + R_j)] for each of the top classes, (B, m) in float64."""
    log_others = log_rest(block, top, index, tau)
    before = (top - top[:, :1]) / tau
    after = (low - top[:, :1]) / tau
    if block.requires_grad:
        # The form below has no derivative where s_j = low exactly; this one is smooth.
        return torch.logaddexp(before, log_others) - torch.logaddexp(after, log_others)
    # log1p(x) with x = |u_j - l| / (min(u_j, l) + R_j), as softplus(log x): x itself overflows.
    gap = (top - low) / tau
    larger, smaller = torch.maximum(before, after), torch.minimum(before, after)
    log_x = (larger - torch.logaddexp(smaller, log_others)) + (-torch.expm1(-gap.abs())).log()
    return gap.sign() * torch.logaddexp(log_x, torch.zeros_like(log_x))


def _neg_entropy(block: Tensor, tau: float) -> Tensor:
    """-(log Z + (1/Z) sum_k e_k (-log e_k)) with e_k = e^{(f_k - f_max)/tau}, Z = sum_k e_k."""
    top, index = top_values(block, 1)
    odds = log_rest(block, top, index, tau)[:, 0].exp()
    relative = ((block - top.to(block.dtype)) / tau).exp()
    entropy: Tensor = odds.log1p() + torch.special.entr(relative).sum(dim=1) / (1 + odds)
    return -entropy


def _gen(block: Tensor, gamma: float, top_m: int) -> Tensor:
    top, index = top_values(block, min(top_m, block.shape[1]))
    log_others = log_rest(block, top, index, 1.0)
    log_z = log_others[:, :1].exp().log1p()
    log_p, log_not_p = top - top[:, :1] - log_z, log_others - log_z
    return -(gamma * (log_p + log_not_p)).exp().sum(dim=1)


def _check_re_alignment(
    similarity: Tensor, taus: Sequence[float], cs: Sequence[int], low: float
) -> None:
    if not taus or not cs:
        raise ValueError(f"taus and cs need at least one value each, came {taus} and {cs}")
    for tau in taus:
        check_positive(tau, "tau")
    for c in cs:
        if c != int(c) or not 1 <= c <= similarity.shape[1]:
            raise ValueError(
                f"c must be a whole number from 1 to the number of classes "
                f"({similarity.shape[1]}), came {c}"
            )
    if not math.isfinite(low):
        raise ValueError(f"low must be finite, came {low}")


# gl_mcm, neg_label and neg_mcm need more than similarity or logits: callers that lack it skip them.
SCORES: Table[Entry] = Table(
    {
        "msp": Entry(msp, ("logits",)),
        "max_logit": Entry(max_logit, ("logits",)),
        "energy": Entry(energy, ("logits",)),
        "neg_entropy": Entry(neg_entropy, ("logits",)),
        "gen": Entry(gen, ("logits",)),
        "mcm": Entry(mcm, ("similarity",)),
        "gl_mcm": Entry(gl_mcm, ("similarity", "local_similarity")),
        "neg_label": Entry(neg_label, ("similarity", "negative_similarity")),
        "neg_mcm": Entry(neg_mcm, ("similarity", "negative_similarity")),
        "delta_energy": Entry(delta_energy, ("similarity",)),
    }
)
