"""No image serves two purposes, whatever its name: the sets are compared by what is seen of them.

`pipelines.data.benchmarks` refuses equal keys and classes before anything is read. This looks at
the images themselves, by the hash that `embed` keeps beside each feature, in every pair of sets:

| the same image in | is |
|---|---|
| a set that trains or chooses, and one that is tested | refused |
| two sets of different roles that train or choose | refused: what trains must not choose |
| a set of known classes, and one of unknown ones | refused: an image is ID or OOD |
| `test` and `shifted`, two sets of a role, one set twice | said in the report: it counts twice |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark
from pipelines.data.storage import Storage
from pipelines.embed.result import SharedImages
from pipelines.records import Role, SetName

Place = tuple[str, str]  # source, key


class Hashed(Protocol):
    """Features or decoded images of a source, with a hash of what is seen of each image."""

    def image_hashes(self, keys: Sequence[str]) -> list[bytes | None]:
        """In the order of the keys; None where an image could not be read."""


# Of two sets with one image, the one named first here is to leave it out: tests stay as they are.
_LEAVES: tuple[Role, ...] = (
    "outliers", "train", "validation_ood", "validation_shifted", "validation", "ood", "shifted",
    "test",
)  # fmt: skip
_UNKNOWN: tuple[Role, ...] = ("outliers", "validation_ood", "ood")

_TESTED = "what trains or chooses must not be tested on"
_CHOSEN = "what trains must not choose"
_BOTH = "an image is ID or OOD, not both"


@dataclass(frozen=True)
class Overlap:
    """Images that two sets share, or that one set holds twice.

    Attributes:
        leaving: the set that is to leave them out.
        other: the other set, or the same.
        pairs: for each shared image of `leaving` its place there, and one in `other`.
        why: why this is refused; empty where it is only said.
    """

    leaving: str
    other: str
    pairs: tuple[tuple[Place, Place], ...]
    why: str

    def __str__(self) -> str:
        """One line: the sets, how many images, and one of them by both its names."""
        (source, key), (other, same) = self.pairs[0]
        images = "1 image" if len(self.pairs) == 1 else f"{len(self.pairs)} images"
        what = f"{self.leaving!r} and {self.other!r} share {images}"
        if self.leaving == self.other:
            what = f"{self.leaving!r} holds {images} twice"
        return f"{what}: {key} of {source} is {same} of {other}"


def refuse(
    benchmark: Benchmark,
    caches: Mapping[str, Hashed],
    storage: Storage,
    place: tuple[str, ...],
) -> tuple[SharedImages, ...]:
    """Stop where an image serves two purposes; gives what sets share otherwise.

    Args:
        benchmark: its sets.
        caches: the features of its sources, with image hashes.
        storage: where the keys of shared images are written, by the set they are to leave.
        place: the parts of that file's path.

    Raises:
        UserError: naming the sets, how many images, and one of them; and what the caches raise.
    """
    shared = overlaps(benchmark, caches)
    wrong = [overlap for overlap in shared if overlap.why]
    chosen = wrong or shared
    if chosen:
        keys: dict[str, set[str]] = {}
        for overlap in chosen:
            keys.setdefault(overlap.leaving, set()).update(key for (_, key), _ in overlap.pairs)
        storage.write_json({name: sorted(images) for name, images in keys.items()}, *place)
    if wrong:
        file = storage.path(*place)
        words = " ".join(f"'benchmark.sets.{name}.not_keys={file}#{name}'" for name in keys)
        why = "; ".join(dict.fromkeys(overlap.why for overlap in wrong))
        raise UserError(
            f"benchmark {benchmark.name!r}: {'; '.join(map(str, wrong))}. {why[0].upper()}{why[1:]}"
            f"; leave these images out with {words}"
        )
    return tuple(
        SharedImages(sets=(o.leaving, o.other), images=len(o.pairs), first=str(o)) for o in shared
    )


def overlaps(benchmark: Benchmark, caches: Mapping[str, Hashed]) -> list[Overlap]:
    """Every pair of sets with an image in common, and every set that holds one twice.

    Args:
        benchmark: its sets.
        caches: the features of its sources, with image hashes.
    """
    by_source = {source: _hashes(benchmark, source, cache) for source, cache in caches.items()}
    places: dict[bytes, dict[str, list[Place]]] = {}
    for name in benchmark.sets:
        for image, place in _members(benchmark, name, by_source):
            places.setdefault(image, {}).setdefault(name, []).append(place)
    pairs: dict[tuple[str, str], list[tuple[Place, Place]]] = {}
    for sets in places.values():
        for name, (first, *again) in sets.items():
            if again:
                pairs.setdefault((name, name), []).extend((place, first) for place in again)
        for leaving, other in itertools.combinations(_in_order(sets), 2):
            shared = ((place, sets[other][0]) for place in sets[leaving])
            pairs.setdefault((leaving, other), []).extend(shared)
    order = {name: number for number, name in enumerate(benchmark.sets)}
    found = sorted(pairs.items(), key=lambda item: [order[name] for name in item[0]])
    return [Overlap(*names, tuple(sorted(p)), _why(*names)) for names, p in found]


def _in_order(sets: Iterable[str]) -> Sequence[str]:
    """Sets by who is to leave an image out first; of one role, the later named."""
    places = {name: number for number, name in enumerate(sets)}
    return sorted(places, key=lambda name: (_LEAVES.index(SetName.parse(name).role), -places[name]))


def _why(leaving: str, other: str) -> str:
    """Why an image must not be in both sets; empty where it may."""
    one, two = SetName.parse(leaving), SetName.parse(other)
    if one.trains != two.trains:
        return _TESTED
    if (one.role in _UNKNOWN) != (two.role in _UNKNOWN):
        return _BOTH
    return _CHOSEN if one.trains and one.role != two.role else ""


def _hashes(benchmark: Benchmark, source: str, cache: Hashed) -> dict[str, bytes]:
    """The hash of every image of a source that some set needs; rejected ones have none."""
    keys = benchmark.keys_by_source()[source]
    images = zip(keys, cache.image_hashes(keys), strict=True)
    return {key: image for key, image in images if image is not None}


def _members(
    benchmark: Benchmark, name: str, by_source: Mapping[str, Mapping[str, bytes]]
) -> list[tuple[bytes, Place]]:
    chosen = benchmark.sets[name]
    places = zip(chosen.sources, chosen.keys, strict=True)
    return [(by_source[s][k], (s, k)) for s, k in places if k in by_source[s]]
