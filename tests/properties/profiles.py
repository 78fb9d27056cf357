"""A property as two tests: a short one of `make test`, a long one of `make test-slow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# No input may take longer, on a machine that does other things too.
LIMIT_MS = 5000
SHORT, LONG = 80, 1000
# Each input makes what it needs; fixtures are made once and only read.
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def both(
    check: Callable[..., None],
    strategy: st.SearchStrategy[Any],
    examples: Iterable[Any],
    *,
    short: int = SHORT,
    long: int = LONG,
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The short and the long test that `check` holds; both begin with the `examples`."""

    def test(number: int) -> Callable[..., None]:
        def called(value: Any) -> None:
            check(value)

        wrapped: Any = given(strategy)(called)
        for value in examples:
            wrapped = example(value)(wrapped)
        made: Callable[..., None] = settings(
            max_examples=number,
            deadline=LIMIT_MS,
            suppress_health_check=SUPPRESSED,
            derandomize=number == short,
        )(wrapped)
        return made

    return test(short), pytest.mark.slow(test(long))
