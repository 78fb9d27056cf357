"""Where in the image: maps of the patches of the most confident mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pipelines import plots
from pipelines.evaluate.metrics import MetricRow
from pipelines.report.mistakes import Mistake, MistakeKind, data_uri
from pipelines.score.patches import PatchMap

# (a method's row, [(set name, key), ...]) to a map of each image, None where it cannot be had; or
# why the method has no maps.
Maps: TypeAlias = Callable[[MetricRow, Sequence[tuple[str, str]]], list[PatchMap | None] | str]

# Pictures in all, and the pixels of a side.
_MOST = 12
_SIDE = 112


@dataclass(frozen=True)
class Shown:
    """A mistake, which kind it is of, and its map as a data URI with what it shows."""

    row: MetricRow
    kind: str
    mistake: Mistake
    picture: str
    caption: str


@dataclass(frozen=True)
class Where:
    """The section: its maps, and of each method without any the reason."""

    shown: list[Shown]
    reasons: list[str]


def where_in_the_image(
    found: Sequence[tuple[MetricRow, Sequence[MistakeKind]]], maps: Maps
) -> Where:
    """The maps of the most confident mistakes, as many of each method.

    Args:
        found: the mistakes of each method under its selection criterion.
        maps: gives the maps.
    """
    none = {row.method: why for row, _ in found if isinstance(why := maps(row, []), str)}
    mapped = [(row, kinds) for row, kinds in found if row.method not in none]
    shown: list[Shown] = []
    share = max(1, _MOST // max(1, len(mapped)))
    for row, kinds in mapped[:_MOST]:
        chosen = list(itertools.islice(_ranked(kinds), share))
        drawn = maps(row, [(mistake.set_name, mistake.key) for _, mistake in chosen])
        assert not isinstance(drawn, str)
        shown += [
            Shown(row, kind, mistake, _picture(one), one.caption)
            for (kind, mistake), one in zip(chosen, drawn, strict=True)
            if one is not None
        ]
    return Where(shown, [f"{method}: no map, {why}." for method, why in none.items()])


def _ranked(kinds: Sequence[MistakeKind]) -> Iterator[tuple[str, Mistake]]:
    """The first of each kind, then the second of each, and so on."""
    columns = [[(kind.name, mistake) for mistake in kind.samples] for kind in kinds]
    for row in itertools.zip_longest(*columns):
        yield from (entry for entry in row if entry is not None)


def _picture(one: PatchMap) -> str:
    return data_uri(plots.heat_map(one.crop, one.values, side=_SIDE), "JPEG")
