"""An axis of a sweep's picture, whatever was tried along it: numbers or words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from pipelines.sweep.importance import is_number, spans_decades

_CLOSEST = 0.06  # of an axis: what two written values need between them
_LONGEST = 18  # characters of a written value


@dataclass(frozen=True)
class Scale:
    """An axis from 0 to 1: numbers (logarithmic over decades) or words, one step each.

    Attributes:
        name: what is written beside it.
        numbers: the values, ascending; empty where they are words.
        words: the values in the order in which they were tried; empty where they are numbers.
        log: whether the numbers are spaced by their logarithms.
    """

    name: str
    numbers: tuple[float, ...] = ()
    words: tuple[str, ...] = ()
    log: bool = False

    @classmethod
    def of(cls, name: str, tried: Sequence[object]) -> Scale:
        """The axis of the values that were tried."""
        numbers = sorted({float(value) for value in tried if is_number(value)})
        if all(map(is_number, tried)):
            return cls(name, tuple(numbers), log=spans_decades(numbers))
        return cls(name, words=tuple(dict.fromkeys(map(str, tried))))

    def place(self, value: object) -> float:
        """Where a value stands."""
        if len(self.numbers or self.words) == 1:
            return 0.5
        if self.words:
            return self.words.index(str(value)) / (len(self.words) - 1)
        assert is_number(value)
        ends = self.numbers[0], self.numbers[-1], float(value)
        low, high, at = np.log(ends) if self.log else np.asarray(ends)
        return float((at - low) / (high - low))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and what is written there: the values, or round numbers where they crowd."""
        if self.words:
            return [(self.place(word), _shortened(word)) for word in self.words]
        places = [self.place(value) for value in self.numbers]
        crowded = any(b - a < _CLOSEST for a, b in itertools.pairwise(places))
        values = self._round_numbers() if crowded else self.numbers
        return [(self.place(value), self._written(value)) for value in values]

    def _round_numbers(self) -> list[float]:
        """Round numbers within the axis."""
        low, high = self.numbers[0], self.numbers[-1]
        if not self.log:
            values = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            return [float(value) for value in values if low <= value <= high]
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if len(powers) > 4 else (1, 2, 5)
        spaced = [step * 10.0**power for power in powers for step in steps]
        return [v for v in spaced if low <= v * (1 + 1e-9) and v <= high * (1 + 1e-9)]

    def _written(self, value: float) -> str:
        return f"{value:.1f}" if self.name.endswith("(%)") else _shortened(f"{value:.3g}")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\u2026"
