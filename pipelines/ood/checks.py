"""What every score and loss asks of its input, and the walk over rows that they share.

Inputs are torch tensors or numpy arrays of floating-point numbers, one row per sample. A user's
mistake (wrong rank, no class, NaN, a temperature of zero) is a `ValueError` that says what came
and what is allowed.

Dtypes: float64 stays float64; float32, float16 and bfloat16 are computed in at least float32 and
come back as float32. Half-precision scores tie and move FPR by points, so cast half-precision
features up before their similarities are taken; ask for float64 results by float64 input.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = Tensor | np.ndarray[Any, np.dtype[Any]]

# Elements of one block of rows. On a CPU a block and its one copy (2 MB each in float32) stay in
# the cache, which is where the speed comes from; an accelerator wants few large launches instead.
_CPU_BLOCK = 2**19
_ACCELERATOR_BLOCK = 2**26


def share_memory(values: Array) -> Tensor:
    """Return `values` as a tensor without a copy."""
    with warnings.catch_warnings():
        # A read-only numpy array (Parquet hands them out) is only ever read here.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.as_tensor(values)


def as_tensor(values: Array, name: str, *, rank: int) -> Tensor:
    """Return floating-point `values` as a tensor that shares their memory.

    Raises:
        ValueError: The dtype is not a floating-point one, or the number of dimensions is not
            `rank`, or a dimension other than the first is empty.
    """
    tensor = share_memory(values)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating-point, came {tensor.dtype}")
    if tensor.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, came shape {tuple(tensor.shape)}")
    if 0 in tensor.shape[1:]:
        raise ValueError(
            f"{name} needs at least one entry in each dimension after the first, "
            f"came shape {tuple(tensor.shape)}"
        )
    return tensor


def as_batch(values: Array, name: str, *, rank: int = 2) -> Tensor:
    """Return finite floating-point `values` with at least one row, in at least float32.

    Raises:
        ValueError: As in `as_tensor`, or there is no row, or a value is NaN or infinite.
    """
    tensor = as_tensor(values, name, rank=rank)
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} is empty, shape {tuple(tensor.shape)}; a mean needs a sample")
    check_finite(tensor, name)
    return tensor.to(working_dtype(tensor))


def as_labels(labels: Array, name: str, *, num_rows: int, num_classes: int) -> Tensor:
    """Return class indices as int64 (num_rows,), num_rows >= 1.

    Raises:
        ValueError: They are no integers, have another shape, or do not lie in 0..num_classes - 1.
    """
    targets = share_memory(labels)
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != (num_rows,):
        raise ValueError(
            f"{name} must be integers of shape ({num_rows},), came {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        raise ValueError(
            f"{name} must lie in 0..{num_classes - 1}, came {int(targets.min())} to "
            f"{int(targets.max())}"
        )
    return targets.long()


def check_positive(value: float, name: str) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, came {value}")


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError if a value of `tensor` is NaN or infinite, with the count and first row."""
    count, first_row, rows = 0, -1, _rows_per_block(tensor)
    for index, block in enumerate(torch.split(tensor.detach(), rows)):
        bad = ~torch.isfinite(block)
        if first_row < 0 and bad.any():
            first_row = index * rows + int(bad.nonzero()[0, 0])
        count += int(bad.sum())
    if count:
        raise ValueError(
            f"{name} holds {count} NaN or infinite value(s), the first in row {first_row} "
            f"(counted from 0); every value must be finite"
        )


def check_shares(shares: Tensor, name: str, *, num_classes: int | None = None) -> None:
    """Raise ValueError unless `shares` (K,) are finite, non-negative and not all zero."""
    if shares.ndim != 1 or shares.shape[0] != (num_classes or max(1, shares.shape[0])):
        raise ValueError(
            f"{name} must have shape ({num_classes or 'K'},), came {tuple(shares.shape)}"
        )
    check_finite(shares, name)
    if (shares < 0).any() or not (shares > 0).any():
        raise ValueError(
            f"{name} must be >= 0 with at least one > 0, came minimum {float(shares.min())} "
            f"and sum {float(shares.sum())}"
        )


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a result comes back in: float64 if an input is float64, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def finite_blocks(**inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of every input, block after block; one empty block if N = 0.

    NaN and infinity are looked for inside this walk, by one sum over a block that its user reads
    next, so that validation costs no second trip to memory.

    Args:
        inputs: Tensors with the same first dimension, by the name used in messages.

    Raises:
        ValueError: The inputs differ in their number of rows, or one holds NaN or infinity.
    """
    if len({tensor.shape[0] for tensor in inputs.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise ValueError(f"inputs must have the same number of rows, came {shapes}")
    rows = min(_rows_per_block(tensor) for tensor in inputs.values())
    for blocks in zip(*(torch.split(tensor, rows) for tensor in inputs.values()), strict=True):
        for (name, tensor), block in zip(inputs.items(), blocks, strict=True):
            # A sum is finite unless a value is not (or it overflows: the exact check forgives).
            if not math.isfinite(block.detach().sum(dtype=working_dtype(block)).item()):
                check_finite(tensor, name)
        yield blocks


def map_rows(
    function: Callable[..., Tensor], *, result_dtype: torch.dtype | None = None, **inputs: Tensor
) -> Tensor:
    """Apply a row-wise `function` to `finite_blocks` and join the results.

    Args:
        function: Takes one block per input, in order, each in `working_dtype`, and returns one
            value per row.
        result_dtype: Of the result; None: `working_dtype`.
        inputs: As in `finite_blocks`.

    Returns:
        (N,) values. Gradients flow through.
    """
    tensors = tuple(inputs.values())
    dtype = working_dtype(*tensors)
    kept = result_dtype or dtype
    results = (function(*(b.to(dtype) for b in blocks)) for blocks in finite_blocks(**inputs))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return torch.cat([result.to(kept) for result in results])
    # Filled in place: small results kept between blocks would break up the memory they reuse.
    joined, start = torch.empty(len(tensors[0]), dtype=kept, device=tensors[0].device), 0
    for result in results:
        joined[start : start + len(result)] = result
        start += len(result)
    return joined


def _rows_per_block(tensor: Tensor) -> int:
    elements = _CPU_BLOCK if tensor.device.type == "cpu" else _ACCELERATOR_BLOCK
    return max(1, elements // max(1, math.prod(tensor.shape[1:])))
