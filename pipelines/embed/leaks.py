"""No image that trains a head or chooses a setting may be in a test set, whatever its name.

`pipelines.data.benchmarks` refuses equal names and classes before anything is read. This looks at
the images themselves, by the hash that `embed` keeps beside each feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark
from pipelines.data.features import FeatureCache
from pipelines.data.storage import Storage
from pipelines.records import SetName

Place = tuple[str, str]  # source, key


@dataclass(frozen=True)
class Overlap:
    """Images that a set for training or choosing shares with a test set.

    Attributes:
        seen: the set of a training role.
        tested: the test set.
        pairs: for each shared image of `seen` its place there, and one in `tested`.
    """

    seen: str
    tested: str
    pairs: tuple[tuple[Place, Place], ...]

    def __str__(self) -> str:
        """One line: the sets, how many images, and one of them by both its names."""
        (source, key), (other, same) = self.pairs[0]
        images = "1 image" if len(self.pairs) == 1 else f"{len(self.pairs)} images"
        return (
            f"{self.seen!r} and {self.tested!r} share {images}: {key} of {source} is {same} of "
            f"{other}"
        )


def refuse(
    benchmark: Benchmark,
    caches: Mapping[str, FeatureCache],
    storage: Storage,
    place: tuple[str, ...],
) -> None:
    """Stop where an image that trains or chooses is in a test set.

    Args:
        benchmark: its sets.
        caches: the features of its sources, with image hashes.
        storage: where the keys of shared images are written, by the set they are to leave.
        place: the parts of that file's path.

    Raises:
        UserError: naming the sets, how many images, and one of them; and what the caches raise.
    """
    shared = overlaps(benchmark, caches)
    if not shared:
        return
    keys: dict[str, set[str]] = {}
    for overlap in shared:
        keys.setdefault(overlap.seen, set()).update(key for (_, key), _ in overlap.pairs)
    storage.write_json({name: sorted(images) for name, images in keys.items()}, *place)
    file = storage.path(*place)
    words = " ".join(f"'benchmark.sets.{name}.not_keys={file}#{name}'" for name in keys)
    raise UserError(
        f"benchmark {benchmark.name!r}: {'; '.join(map(str, shared))}. What trains or chooses "
        f"must not be tested on; leave these images out with {words}"
    )


def overlaps(benchmark: Benchmark, caches: Mapping[str, FeatureCache]) -> list[Overlap]:
    """Every pair of a training set and a test set with an image in common.

    Args:
        benchmark: its sets.
        caches: the features of its sources, with image hashes.
    """
    by_source = {source: _hashes(benchmark, source, cache) for source, cache in caches.items()}
    tested: dict[bytes, dict[str, Place]] = {}
    members = {name: _members(benchmark, name, by_source) for name in benchmark.sets}
    for name, images in members.items():
        if not SetName.parse(name).trains:
            for image, place in images:
                tested.setdefault(image, {}).setdefault(name, place)
    pairs_of: dict[tuple[str, str], list[tuple[Place, Place]]] = {}
    for name, images in members.items():
        if SetName.parse(name).trains:
            for image, place in images:
                for other, same in tested.get(image, {}).items():
                    pairs_of.setdefault((name, other), []).append((place, same))
    return [Overlap(*names, tuple(pairs)) for names, pairs in pairs_of.items()]


def _hashes(benchmark: Benchmark, source: str, cache: FeatureCache) -> dict[str, bytes]:
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
