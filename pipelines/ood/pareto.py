"""The Pareto front of points with two figures each."""

import numpy as np
from numpy.typing import NDArray


def pareto_front(
    points: NDArray[np.float64], *, maximised: tuple[bool, bool] = (True, True)
) -> NDArray[np.bool_]:
    """Which points no other one equals or beats in both figures and beats in one, (N,).

    Of equal points all are on the front or none is.

    Args:
        points: (N, 2), two figures of each.
        maximised: whether more is better, of each figure.
    """
    signed = np.where(maximised, points, -points)
    as_good = np.all(signed[:, None, :] <= signed[None, :, :], axis=2)
    better = np.any(signed[:, None, :] < signed[None, :, :], axis=2)
    beaten: NDArray[np.bool_] = np.any(as_good & better, axis=1)
    return ~beaten
