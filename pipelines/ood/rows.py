"""One walk over rows of features for every fitted score: blocks of float64, never all at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.ood.checks import Array
from pipelines.ood.statistics import feature_rows

_BLOCK = 2**22  # numbers in the largest temporary of one block of rows


def walk(features: Array, parameters: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores (N,) of features (N, D), a block of float64 rows at a time; `parameters` (C, D).

    Args:
        features: (N, D).
        parameters: what the rows are compared with; its dtype and device are those of the blocks.
        score: of one block (B, D), float64 (B,).
    """
    rows = feature_rows(features, parameters.shape[1])
    step = max(1, _BLOCK // max(parameters.shape))
    return torch.cat([score(part.to(parameters)) for part in torch.split(rows, step)])
