"""The largest similarities of each row, and what the other classes weigh against them.

Scores that look at how far the top classes stand out (DeltaEnergy, GEN, entropy) lose their digits
in 1 - p or in the difference of two logsumexps. These two functions keep them.
"""

import math

import torch
from torch import Tensor


def top_values(block: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The `num_top` largest values of each row in descending order, float64 (B, m); first index."""
    if num_top == 1:  # several times as fast as topk
        values, indices = block.max(dim=1, keepdim=True)
    else:
        values, indices = block.topk(num_top, dim=1)
    return values.double(), indices[:, :1]


def log_rest(block: Tensor, top: Tensor, index: Tensor, tau: float) -> Tensor:
    """Log of R_j / u_1, R_j = sum of u_n = e^{s_n/tau} over the classes other than y_j; (B, m).

    R_1 is summed without the top class and relative to the second, so that it keeps its digits
    however far the top class stands out. For j >= 2, R_j = u_1 + (R_1 - u_j) takes no harm from
    its subtraction: u_j <= u_1, so the error is one of R_1, and R_1 <= R_j.
    """
    if block.shape[1] == 1:
        return torch.full_like(top, -math.inf)
    rest = block.scatter(1, index, -math.inf)
    second = rest.detach().amax(dim=1, keepdim=True)
    total = rest.sub_(second).div_(tau).exp_().sum(dim=1, keepdim=True)
    log_first = total.double().log() + (second.double() - top[:, :1]) / tau
    others = ((top[:, 1:] - top[:, :1]) / tau).exp()
    # Rounding may take R_1 - u_j below zero by its last digit, never near -1.
    return torch.cat((log_first, (log_first.exp() - others).log1p()), dim=1)
