"""Tables of plug-ins by name, and the row that `SCORES` and `LOSSES` are made of."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

# Every array that a score or a loss may ask for. A caller offers the ones it has.
INPUTS = frozenset(
    {
        "similarity", "logits", "local_similarity", "negative_similarity", "id_logits",
        "ood_logits", "prior", "image_features", "text_features", "labels", "id_projections",
        "ood_projections", "tail_classes", "drawn_labels", "class_weights", "class_prior",
    }
)  # fmt: skip

Row = TypeVar("Row")


class Table(Mapping[str, Row]):
    """Plug-ins by name, read only.

    A table that is annotated with this class is where results stop depending on code: who uses a
    row names it (`pipelines.code_digest`), so a new row changes no address of other results.
    """

    def __init__(self, rows: Mapping[str, Row]) -> None:
        """Keep a copy of `rows`, in their order."""
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Row:
        """The row of that name."""
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the table."""
        return iter(self._rows)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)


@dataclass(frozen=True)
class Entry:
    """A score or loss that is called by the names of its inputs and parameters.

    `SCORES[name](similarity=s, logits=f, tau=0.5)` works for any entry whose inputs are among
    those offered: inputs it does not use are ignored, parameters it does not have are refused.

    Attributes:
        function: The function itself.
        inputs: Names of the arrays that it reads, in the order of its arguments.
    """

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]

    @property
    def input(self) -> str:
        """The first input: `similarity` or `logits` for every score that needs nothing else."""
        return self.inputs[0]

    @property
    def parameters(self) -> Mapping[str, float]:
        """Tunable keyword parameters and their defaults."""
        return {
            name: parameter.default
            for name, parameter in self._own_parameters().items()
            if parameter.default is not inspect.Parameter.empty
        }

    @property
    def required(self) -> tuple[str, ...]:
        """Parameters without a default: the caller must give them."""
        return tuple(name for name in self._own_parameters() if name not in self.parameters)

    def __call__(self, /, **given: Any) -> Tensor:
        """Call the function with what it needs of `given`.

        Raises:
            ValueError: An input or a required parameter is missing, or a name is neither an input
                nor a parameter of this entry.
        """
        wanted = {*self.inputs, *self._own_parameters()}
        missing = [name for name in (*self.inputs, *self.required) if given.get(name) is None]
        if missing:
            raise ValueError(f"{self.function.__name__} needs {', '.join(missing)}")
        unknown = sorted(set(given) - wanted - INPUTS)
        if unknown:
            allowed = ", ".join(self._own_parameters()) or "none"
            raise ValueError(
                f"{self.function.__name__} has no parameter {', '.join(unknown)}; it has: {allowed}"
            )
        return self.function(**{name: value for name, value in given.items() if name in wanted})

    def _own_parameters(self) -> dict[str, inspect.Parameter]:
        signature = inspect.signature(self.function).parameters
        return {name: value for name, value in signature.items() if name not in self.inputs}
