"""The features of a benchmark's sets, and which roles a stage may open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import UserError, digest
from pipelines.data.benchmarks import Benchmark
from pipelines.data.features import FeatureCache
from pipelines.data.members import Chosen, SetMembers
from pipelines.records import TRAINING_ROLES, Role, SetName


@dataclass(frozen=True)
class FeatureSet:
    """The embedded images of one set: keys, features (N, D) and labels (N,), row by row."""

    name: str
    keys: tuple[str, ...]
    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.keys)


@dataclass(frozen=True)
class FeatureSets:
    """A benchmark's sets as features; `roles` are the only ones that may be opened.

    The sweep and the training get a copy without the test roles (`for_training`), so that no
    test image can choose anything. `views` holds the features of augmented views of the training
    images, by source, where there are any.
    """

    benchmark: Benchmark
    caches: Mapping[str, FeatureCache]
    roles: tuple[Role, ...] | None = None
    views: Mapping[str, FeatureCache] = field(default_factory=dict)

    def for_training(self) -> FeatureSets:
        """The view that may open sets of `TRAINING_ROLES` only: no test set."""
        return replace(self, roles=TRAINING_ROLES)

    def names(self, *roles: Role) -> list[str]:
        """The benchmark's sets of these roles."""
        return self.benchmark.names(*roles)

    def load(self, name: str) -> FeatureSet:
        """The set of that name without its rejected images.

        Raises:
            PermissionError: where this view may not open sets of that role.
            UserError: where no image of the set could be read.
        """
        keys, labels, features = [], [], []
        for source, kept, known in self._present(name):
            keys += kept
            labels += known
            features.append(self.caches[source].load(kept))
        return FeatureSet(
            name, tuple(keys), np.concatenate(features), np.asarray(labels, dtype=np.int64)
        )

    def column(self, name: str, column: str) -> NDArray[np.float32]:
        """A further column of a set's features, such as `local_features` (N, P, D).

        Its rows are those of `load(name)`; raises what that raises.

        Raises:
            UserError: where the images were embedded without that column.
        """
        parts = [self.caches[source].load(kept, column) for source, kept, _ in self._present(name)]
        return np.concatenate(parts)

    def views_of(self, name: str) -> NDArray[np.float32] | None:
        """Features (N, V, D) of V augmented views of each row of `load(name)`; None without views.

        Raises what `load` raises.
        """
        if not self.views:
            return None
        parts = [self.views[source].load(kept) for source, kept, _ in self._present(name)]
        count, dim = self.load(name).features.shape
        return np.concatenate(parts).reshape(count, -1, dim)

    def domains(self, name: str) -> NDArray[np.int64]:
        """The domain (N,) of each row of `load(name)`: its place among the set's sorted domains.

        Where no image has a domain, as in a plain folder of images, all are of one: 0.

        Raises:
            UserError: where some images have a domain and others have none.
        """
        keys: list[str] = []
        domains: list[str | None] = []
        for source, kept, _ in self._present(name):
            index = self.benchmark.sources[source].index()
            known = dict(zip(index["key"].to_pylist(), index["domain"].to_pylist(), strict=True))
            keys += [f"{source}: {key}" for key in kept]
            domains += [known.get(key) for key in kept]
        unnamed = [key for key, domain in zip(keys, domains, strict=True) if domain is None]
        if 0 < len(unnamed) < len(keys):
            raise UserError(
                f"set {name!r}: no domain is named for {len(unnamed)} of its {len(keys)} images "
                f"(first: {unnamed[0]}); give every source a column domain or the key domain:, or "
                "choose a method that needs none"
            )
        numbers = {
            domain: number for number, domain in enumerate(sorted({str(d) for d in domains}))
        }
        return np.asarray([numbers[str(domain)] for domain in domains], dtype=np.int64)

    def _present(self, name: str) -> list[tuple[str, list[str], list[int]]]:
        """By source: keys and labels of the set's images that have a feature, in one order."""
        self._refuse(name)
        chosen = self.benchmark.sets[name]
        present_in = []
        for source, cache in self.caches.items():
            rows = [i for i, s in enumerate(chosen.sources) if s == source]
            if not rows:
                continue
            present = cache.present([chosen.keys[i] for i in rows])
            kept = [i for i, there in zip(rows, present, strict=True) if there]
            present_in.append(
                (source, [chosen.keys[i] for i in kept], [chosen.labels[i] for i in kept])
            )
        if not any(keys for _, keys, _ in present_in):
            raise UserError(f"set {name!r}: none of its {len(chosen)} images could be read")
        return present_in

    def members(self, *names: str) -> SetMembers:
        """The images of these sets by source, for a pass over the stored features.

        Raises:
            PermissionError: where this view may not open one of the sets.
        """
        rows: dict[str, list[tuple[str, int, int]]] = {}
        for number, name in enumerate(names):
            self._refuse(name)
            chosen = self.benchmark.sets[name]
            for source, key, label in zip(chosen.sources, chosen.keys, chosen.labels, strict=True):
                rows.setdefault(source, []).append((key, number, label))
        by_source = {}
        for source, images in rows.items():
            keys, numbers, labels = zip(*images, strict=True)
            by_source[source] = Chosen(
                pa.array(keys, pa.string()),
                np.asarray(numbers, dtype=np.int64),
                np.asarray(labels, dtype=np.int64),
            )
        return SetMembers(names, by_source, {source: self.caches[source] for source in by_source})

    def address(self, names: Sequence[str]) -> str:
        """A digest of the content of these sets: images, labels, features, classes, prompts."""
        sets = {name: self.benchmark.sets[name] for name in names}
        members = {n: [chosen.sources, chosen.keys, chosen.labels] for n, chosen in sets.items()}
        used = sorted({source for chosen in sets.values() for source in chosen.sources})
        # The features of a source that is in none of the sets say nothing of them.
        caches = {source: self.caches[source].address for source in used}
        classes = [self.benchmark.class_names, self.benchmark.templates]
        views = {s: self.views[s].address for s in used if s in self.views and "train" in names}
        return digest([members, caches, classes, *([views] if views else [])])

    def _refuse(self, name: str) -> None:
        """Raise a PermissionError where this view may not open the set."""
        if self.roles is not None and SetName.parse(name).role not in self.roles:
            raise PermissionError(f"{name!r} is test data: only score and evaluate may open it")
