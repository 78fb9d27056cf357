"""Checks of what metrics are given: ID and OOD scores, and which predictions are correct."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipelines.ood.statistics import FloatArray, Values, score_array


def both_sides(id_scores: Values, ood_scores: Values) -> tuple[FloatArray, FloatArray]:
    """ID scores (N,) and OOD scores (M,) as float64 arrays.

    Raises:
        ValueError: As `one_side`.
    """
    return one_side(id_scores, "id_scores"), one_side(ood_scores, "ood_scores")


def one_side(scores: Values, name: str) -> FloatArray:
    """Scores (N,) as a float64 array.

    Raises:
        ValueError: There is no score, or one is NaN or inf; it says of which argument, `name`.
    """
    array = score_array(scores, name)
    check_some(array.size, name)
    return array


def check_some(size: int, name: str) -> None:
    """Refuse an argument without scores.

    Raises:
        ValueError: `size`, the number of scores of the argument `name`, is 0.
    """
    if size == 0:
        raise ValueError(f"{name} is empty: a metric needs at least one score of each side")


def correct_rows(correct: Values, size: int | None = None) -> npt.NDArray[np.bool_]:
    """Which of N predictions are correct, as a boolean array (N,).

    Raises:
        ValueError: The values are not boolean, or there are not `size` of them.
    """
    right = np.asarray(correct.detach().cpu() if isinstance(correct, Tensor) else correct)
    boolean = right.dtype == np.bool_ or right.size == 0
    if not boolean or right.shape != (right.size if size is None else size,):
        raise ValueError(
            f"correct must be bool ({'N' if size is None else size},), came {right.dtype} "
            f"{right.shape}"
        )
    return right.astype(np.bool_)
