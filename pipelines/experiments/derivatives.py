"""Exact second derivatives of small functions of one parameter vector."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import jacrev

Function = Callable[[Tensor], Tensor]


def hessian(function: Function) -> Function:
    """All second derivatives of `function` of theta (P,): its output's shape and (P, P)."""
    derivatives: Function = jacrev(jacrev(function))
    return derivatives
