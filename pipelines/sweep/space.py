"""Search spaces in the words of the command line: which values of a method are tried.

A space maps dotted keys of a method to a list (a grid) or to a mapping that names a sampler:

    training.lr: [0.002, 0.02]
    training.lr: {loguniform: [0.0005, 0.1]}
    head.num_context: {int: [2, 16]}
    keep: {uniform: [0.1, 0.9]}
    scope: {choice: [image, top]}

`grid` tries every combination of lists, `random` draws `num_samples` settings from a seed, and
`optuna` (`pipelines.sweep.proposed`) proposes them one after the other. Settings that a method
refuses because two margins are in the wrong order are left out of the grid and drawn again, so
that m_in < m_out holds in every trial.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipelines.config import UserError, group_names, plain
from pipelines.methods import METHODS, AnyMethod, MethodConfig
from pipelines.sweep.domains import Sampler, Space
from pipelines.sweep.result import Settings, SettingValue

# What a network is, or starts from, is no setting of its training.
_FIXED_OF_NETWORKS = ("name", "head", "head.name", "head.train", "head.train.start")
# Draws after which a space whose settings are refused again and again is given up.
_PATIENCE = 1000


def settings(
    method: MethodConfig,
    space: Space,
    *,
    sampler: Sampler,
    num_samples: int | None,
    seed: int,
) -> list[Settings]:
    """The settings that a grid or a random search tries, in order.

    Args:
        method: what they are laid over; settings that it refuses for the order of its margins
            are left out.
        space: dotted keys and what is tried of each; empty: one setting without a change.
        sampler: grid or random; of an empty space there is one setting whatever it is.
        num_samples: settings in all; None (a grid only): every combination. Of a grid with more,
            as many drawn without repetition.
        seed: of the draws.

    Raises:
        UserError: for a key that the method does not have, or a space without a usable setting.
    """
    if not space:
        return [{}]
    for key in space:
        check_key(method, key)
    random = np.random.default_rng(seed)
    if sampler == "grid":
        settings_tried = [
            dict(zip(space, c, strict=True)) for c in itertools.product(*space.values())
        ]
        settings_tried = [values for values in settings_tried if is_ordered(method, values)]
        if num_samples is not None and num_samples < len(settings_tried):
            kept = sorted(random.choice(len(settings_tried), num_samples, replace=False))
            settings_tried = [settings_tried[place] for place in kept]
    else:
        draws = (dict(_drawn(space, random)) for _ in range(_PATIENCE * (num_samples or 1)))
        fitting = (values for values in draws if is_ordered(method, values))
        settings_tried = list(itertools.islice(fitting, num_samples))
    if not settings_tried:
        raise UserError(f"sweep.space.{method.name}: in no setting is m_in below m_out")
    return settings_tried


def _drawn(space: Space, random: np.random.Generator) -> Iterator[tuple[str, SettingValue]]:
    """One value for every key."""
    for key, domain in space.items():
        name, given = ("choice", domain) if isinstance(domain, list) else next(iter(domain.items()))
        yield key, _DRAWS[name](given, random)


def rounded(value: float) -> float:
    """Four digits: what a table prints is what was tried."""
    return float(f"{value:.4g}")


def _log_uniform(given: Sequence[Any], random: np.random.Generator) -> float:
    return math.exp(random.uniform(math.log(given[0]), math.log(given[1])))


_DRAWS: Mapping[str, Callable[[Sequence[Any], np.random.Generator], Any]] = {
    "choice": lambda given, random: given[int(random.integers(len(given)))],
    "uniform": lambda given, random: rounded(random.uniform(*given)),
    "loguniform": lambda given, random: rounded(_log_uniform(given, random)),
    "int": lambda given, random: int(random.integers(given[0], given[1] + 1)),
    "logint": lambda given, random: round(_log_uniform(given, random)),
}


def check_names(space: Iterable[str], methods: Iterable[str]) -> None:
    """Refuse a space for what is no method: a typing error would search nothing.

    Raises:
        UserError: naming it.
    """
    allowed = sorted({*methods, *METHODS, *group_names("method")})
    for name in space:
        if name not in allowed:
            raise UserError(f"sweep.space.{name}: no such method; allowed: {', '.join(allowed)}")


def check_key(method: MethodConfig, key: str, name: str | None = None) -> None:
    """Refuse a dotted key that the method does not have, or that is not searched.

    Args:
        method: whose key it is.
        key: dotted.
        name: the method's in the run, where it has one of its own.

    Raises:
        UserError: naming it.
    """
    of = f"sweep.space.{name or method.name}"
    *parents, last = key.split(".")
    node: Any = plain(method)
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise UserError(f"{of}: no key {key!r} in method {method.name}")
    if method.network is not None and key in _FIXED_OF_NETWORKS:
        raise UserError(
            f"{of}: {key} of a method that trains a whole network is not "
            "searched; two methods of the run can differ in it"
        )


def is_ordered(method: MethodConfig, values: Mapping[str, SettingValue]) -> bool:
    """Whether a setting's two margins, where it has two, are in order."""
    known = {**plain(method), **values}
    m_in, m_out = known.get("m_in"), known.get("m_out")
    if not isinstance(m_in, int | float) or not isinstance(m_out, int | float):
        return (m_in is None) == (m_out is None)
    return m_in < m_out


def in_order(proposed: Mapping[str, SettingValue]) -> Settings:
    """Values as tables print them, the two margins exchanged where they came in the wrong order."""
    values = {k: rounded(v) if isinstance(v, float) else v for k, v in proposed.items()}
    m_in, m_out = values.get("m_in"), values.get("m_out")
    if isinstance(m_in, int | float) and isinstance(m_out, int | float) and m_in > m_out:
        return {**values, "m_in": m_out, "m_out": m_in}
    return values


def with_values(method: MethodConfig, values: Mapping[str, SettingValue]) -> MethodConfig:
    """`method` with dotted keys replaced and everything validated again.

    Raises:
        UserError: for a key that the method does not have, or a value that it refuses.
    """
    data = plain(method)
    for key, value in values.items():
        check_key(method, key)
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[last] = value
    try:
        return parse_method(data)
    except ValidationError as error:
        message = "; ".join(e["msg"] for e in error.errors(include_url=False))
        raise UserError(f"sweep.space.{method.name}: {dict(values)}: {message}") from None


def parse_method(data: Mapping[str, object]) -> MethodConfig:
    """A method's section from plain data, by its `name`."""
    adapter: TypeAdapter[MethodConfig] = TypeAdapter(AnyMethod)
    return adapter.validate_python(dict(data))
