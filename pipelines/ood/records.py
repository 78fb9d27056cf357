"""Frozen records that are fitted to data: their table row, moving them, saving and loading."""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_args, get_origin

import torch
from torch import Tensor

from pipelines.ood.checks import Array

R = TypeVar("R")


class FittedRecord(Protocol):
    """What fitting gives: a score of features (or logits), HIGH for in-distribution."""

    def __call__(self, features: Array, /) -> Tensor:
        """Scores float64 (N,) of features (N, D)."""
        ...


@dataclass(frozen=True)
class FittedScore:
    """One row of `FITTED_SCORES`: a record and what it needs.

    Attributes:
        record: The class, fitted by `record.fit`.
        inputs: Names of the arrays that `fit` needs.
        input: What the fitted record scores: `features`, `logits`, `activations` or
            `perturbed_features`, those of images that took a step up the record's own score, or
            `layers`, the activations of a network's layers side by side.
        settings: What a user sets of it, with defaults: parameters of `fit`, and the size `eps` of
            that step in units of a pixel in [0, 1].
    """

    record: type[Any]
    inputs: tuple[str, ...]
    input: str
    settings: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def reads(self) -> frozenset[str]:
        """The names of all arrays of images that fitting and scoring take."""
        return frozenset({*self.inputs, self.input} - {"labels", "layer_sizes"})

    @property
    def has_own_pass(self) -> bool:
        """Whether what it judges needs a pass over the pixels beside that of the features."""
        return self.input in ("perturbed_features", "layers")

    @property
    def parameters(self) -> Mapping[str, float | str | None]:
        """Tunable parameters of `fit`, which are its keyword-only ones, and their defaults."""
        keywords = [value for value in self._signature if value.kind is value.KEYWORD_ONLY]
        return {value.name: value.default for value in keywords}

    def fit(self, arrays: Mapping[str, Array | None], **parameters: Any) -> FittedRecord:
        """Fit with what the record takes of `arrays`; those it does not take are ignored.

        Raises:
            ValueError: An array is missing, a parameter is unknown, or as the record's own `fit`.
        """
        missing = [name for name in self.inputs if arrays.get(name) is None]
        unknown = sorted(set(parameters) - set(self.parameters))
        if missing or unknown:
            raise ValueError(
                f"{self.record.__name__} needs {', '.join(self.inputs)} and takes "
                f"{', '.join(self.parameters) or 'no parameter'}; missing: {missing}, "
                f"unknown: {unknown}"
            )
        names = [value.name for value in self._signature if value.name not in self.parameters]
        record: FittedRecord = self.record.fit(*(arrays.get(name) for name in names), **parameters)
        return record

    @property
    def _signature(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.record.fit).parameters.values())


def move(record: R, *args: Any, **kwargs: Any) -> R:
    """The record with each of its tensors moved by `Tensor.to(*args, **kwargs)`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(*args, **kwargs)
        if isinstance(value, tuple):
            return tuple(moved(part) for part in value)
        return move(value, *args, **kwargs) if dataclasses.is_dataclass(value) else value

    fields = {name: moved(value) for name, value in vars(record).items()}
    return dataclasses.replace(record, **fields)  # type: ignore[type-var]


def record_state(record: Any) -> dict[str, Tensor]:
    """The tensors and numbers of a record by dotted name, ready for safetensors."""
    state: dict[str, Tensor] = {}
    for name, value in vars(record).items():
        if dataclasses.is_dataclass(value):
            state |= {f"{name}.{key}": tensor for key, tensor in record_state(value).items()}
        elif isinstance(value, tuple) and dataclasses.is_dataclass(value[0]):
            for place, part in enumerate(value):
                own = record_state(part)
                state |= {f"{name}.{place}.{key}": tensor for key, tensor in own.items()}
        elif isinstance(value, tuple):
            state |= {f"{name}.{place}": part.contiguous() for place, part in enumerate(value)}
        else:
            dtype = torch.float64 if isinstance(value, float) else None
            state[name] = torch.as_tensor(value, dtype=dtype).contiguous()
    return state


def record_from_state(record: type[R], state: Mapping[str, Tensor]) -> R:
    """The record whose `record_state` is `state`; scores are identical.

    Raises:
        ValueError: A field is missing.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        kind: Any = field.type
        start = f"{field.name}."
        own = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            values[field.name] = record_from_state(kind, own)
        elif get_origin(kind) is tuple and own:
            values[field.name] = _tuple_from_state(get_args(kind)[0], own)
        elif field.name not in state:
            raise ValueError(f"the state of a {record.__name__} lacks {field.name}")
        else:
            value = state[field.name]
            values[field.name] = value if kind is Tensor else kind(value.item())
    return record(**values)


def _tuple_from_state(kind: type[Any], state: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Tensors, or records of that kind, by the places they had."""
    places = range(len({key.partition(".")[0] for key in state}))
    if not dataclasses.is_dataclass(kind):
        return tuple(state[str(place)] for place in places)
    parts = [
        {k.removeprefix(f"{place}."): v for k, v in state.items() if k.startswith(f"{place}.")}
        for place in places
    ]
    return tuple(record_from_state(kind, part) for part in parts)
