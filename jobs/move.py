"""A storage that was moved or copied: let its MLflow store point to where it lies now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import main

if TYPE_CHECKING:
    from pipelines.store.move import MoveConfig


def section() -> type[MoveConfig]:
    """What the job takes."""
    from pipelines.store.move import MoveConfig

    return MoveConfig


def move(config: MoveConfig) -> None:
    """Rewrite the paths and say how many there were."""
    from pipelines.store.move import run

    before, count = run(config)
    print(f"move: {count} paths rewritten from {before}" if count else "move: nothing to mend")


if __name__ == "__main__":
    main("move", section, move, __doc__)
