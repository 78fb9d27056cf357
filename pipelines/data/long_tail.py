"""Long-tailed training sets out of any benchmark: how many images each class keeps.

Choi 2023, after Cui 2019: class i of C keeps n_i = n_max mu^{i / (C - 1)} images, so
the first class is the most frequent one and the last has mu times as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def profile(num_classes: int, n_max: float, imbalance: float) -> list[int]:
    """Images of each class, first to last, at least one each.

    Args:
        num_classes: C >= 2.
        n_max: images of the first class.
        imbalance: mu, the last class's share of the first one's, in (0, 1].
    """
    steps = num_classes - 1
    # As the public code rounds: down; the small number is for 0.01^(5/5) x 300 = 2.9999...
    return [max(1, int(n_max * imbalance ** (i / steps) + 1e-9)) for i in range(num_classes)]


def largest(available: Sequence[int], imbalance: float) -> float:
    """The largest n_max for which every class has enough of its `available` images."""
    steps = len(available) - 1
    return min(n / float(imbalance ** (i / steps)) for i, n in enumerate(available))


def wanted(
    class_names: Sequence[str],
    counts: Mapping[str | None, int],
    *,
    shots: int | None,
    imbalance: float | None,
) -> dict[str, int] | None:
    """Training images by class; None: all of them.

    Args:
        class_names: in label order.
        counts: images there are.
        shots: images a class, of the first class where there is an imbalance; None: all.
        imbalance: mu of the profile, or None for a balanced set.
    """
    if imbalance is None:
        return None if shots is None else dict.fromkeys(class_names, shots)
    available = [counts.get(name, 0) for name in class_names]
    n_max = largest(available, imbalance) if shots is None else shots
    return dict(zip(class_names, profile(len(available), n_max, imbalance), strict=True))
