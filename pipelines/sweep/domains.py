"""What is tried of one key of a search space: a list of values, or a sampler with its bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

from pydantic import JsonValue

Sampler: TypeAlias = Literal["grid", "random", "optuna"]
# A list of values, or a mapping of a sampler's name to its list.
Domain: TypeAlias = list[JsonValue] | dict[str, list[JsonValue]]
# By dotted key.
Space: TypeAlias = Mapping[str, Domain]

# name of a sampler: what its list holds
SAMPLERS: Mapping[str, str] = {
    "choice": "the values to choose from",
    "uniform": "[from, to]",
    "loguniform": "[from, to], both above 0",
    "int": "[from, to], both included",
    "logint": "[from, to], both included and above 0",
}


def problem(domain: object) -> str | None:
    """What is wrong with a key's list or mapping, or None."""
    if isinstance(domain, list):
        return None if domain else "an empty list"
    if not isinstance(domain, Mapping) or len(domain) != 1:
        return f"came {domain!r}; give a list of values or one of {', '.join(SAMPLERS)}: [...]"
    (name, given), *_ = domain.items()
    if name not in SAMPLERS:
        return f"no sampler {name!r}; allowed: {', '.join(SAMPLERS)}"
    if not isinstance(given, list) or not given:
        return f"{name}: expected {SAMPLERS[name]}, came {given!r}"
    if name == "choice":
        return None
    wanted = int if "int" in name else int | float
    if len(given) != 2 or not all(isinstance(v, wanted) for v in given) or given[0] >= given[1]:
        return f"{name}: expected {SAMPLERS[name]} with from < to, came {given!r}"
    if name.startswith("log") and given[0] <= 0:
        return f"{name}: expected {SAMPLERS[name]}, came {given!r}"
    return None


def size(space: Space) -> int | None:
    """How many combinations a space of lists has; None where a key names a sampler."""
    if not all(isinstance(domain, list) for domain in space.values()):
        return None
    return math.prod(len(domain) for domain in space.values())
