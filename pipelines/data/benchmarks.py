"""A benchmark: named sets of images with labels, chosen from sources by stored rules.

No random number decides who is in a set. Where a part has to be taken (shots, a validation
share), images are ordered by a hash of their key, so the same images are chosen for ever.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from pipelines.config import ConfigError, UserError, digest
from pipelines.data.benchmark_config import BenchmarkConfig, SetConfig
from pipelines.data.long_tail import wanted
from pipelines.data.names import plain
from pipelines.data.schema import NO_LABEL
from pipelines.data.sources import Source
from pipelines.data.stored_lists import read_list
from pipelines.records import Role, SetName

# Sets of these roles show every class; those of `SHIFTED_ROLES` show known classes too.
ID_ROLES: tuple[Role, ...] = ("train", "validation", "test")
SHIFTED_ROLES: tuple[Role, ...] = ("shifted", "validation_shifted")


@dataclass(frozen=True)
class Selection:
    """The images of a set: row by row the source, the key and the label (-1: none)."""

    sources: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.keys)


@dataclass(frozen=True)
class Benchmark:
    """An opened benchmark; `sets` in the order of its configuration."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    notes: str
    sources: Mapping[str, Source]
    sets: Mapping[str, Selection]
    address: str

    def image(self, set_name: str, key: str) -> bytes | None:
        """The encoded image of a set's key, or None where it cannot be read."""
        chosen = self.sets[set_name]
        source = self.sources[chosen.sources[chosen.keys.index(key)]]
        (content,) = source.read([key])
        return content if isinstance(content, bytes) else None

    def names(self, *roles: Role) -> list[str]:
        """The names of the sets with one of these roles."""
        return [name for name in self.sets if SetName.parse(name).role in roles]

    def keys_by_source(self, *roles: Role) -> dict[str, list[str]]:
        """Every key that some set needs (of these roles, where given), sorted, by source."""
        needed: dict[str, set[str]] = {name: set() for name in self.sources}
        for chosen in (self.sets[name] for name in (self.names(*roles) if roles else self.sets)):
            for source, key in zip(chosen.sources, chosen.keys, strict=True):
                needed[source].add(key)
        return {name: sorted(keys) for name, keys in needed.items() if keys}


def open_benchmark(
    config: BenchmarkConfig, *, shots: int | None = None, imbalance: float | None = None
) -> Benchmark:
    """Look into the sources and choose the images of every set.

    Args:
        config: the benchmark.
        shots: training images a class, spread over the training domains; None: all.
        imbalance: the last class's share of the first one's training images, with an
            exponential profile between (`pipelines.data.long_tail`); None: as they are.

    Raises:
        UserError: for a missing or empty source, a label outside the class list, a class
            without images, or sets that must not share images or classes but do.
    """
    sources = _found_sources(config)
    rows = {name: _rows(name, source) for name, source in sources.items()}
    sets, classes = {}, {}
    problems: list[str] = []
    for name, chosen in config.sets.items():
        taken = _cap(_choose(config, name, chosen, rows), chosen.per_class)
        if name == "train":
            counts = Counter(row.class_name for row in taken)
            limits = wanted(config.class_names, counts, shots=shots, imbalance=imbalance)
            problems += _too_few(counts, limits, f"shots={shots}")
            taken = _cap(taken, limits)
        try:
            sets[name] = _selection(config, name, taken)
        except UserError as error:  # the same would be said of the sets that follow
            raise ConfigError([*problems, str(error)]) from None
        classes[name] = {row.class_name for row in taken if row.class_name is not None}
    if problems:
        raise ConfigError(problems)
    prints = {name: source.fingerprint() for name, source in sources.items()}
    _refuse_shared_images(config, sets, prints)
    _refuse_shared_classes(config, classes)
    members = {name: [chosen.keys, chosen.labels] for name, chosen in sets.items()}
    return Benchmark(
        name=config.name,
        class_names=tuple(config.class_names),
        templates=tuple(config.templates),
        notes=config.notes,
        sources=sources,
        sets=sets,
        address=digest([prints, members, config.class_names, config.templates]),
    )


@dataclass(frozen=True)
class _Row:
    source: str
    key: str
    class_name: str | None
    domain: str | None
    split: str


def _found_sources(config: BenchmarkConfig) -> dict[str, Source]:
    """The sources that some set uses.

    Raises:
        ConfigError: of all that are not there, with the words that leave their sets out.
    """
    users: dict[str, list[str]] = defaultdict(list)
    for set_name, chosen in config.sets.items():
        for source in chosen.source:
            users[source].append(set_name)
    sources: dict[str, Source] = {}
    problems = []
    for name, sets in users.items():
        try:
            sources[name] = _first(name, config.sources[name])
        except UserError as error:
            words = " ".join(f'"benchmark.sets.{set_name}=null"' for set_name in sets)
            needed = any(SetName.parse(s).role in ID_ROLES for s in sets)
            problems.append(f"{error}" if needed else f"{error}, or leave it out: {words}")
    if problems:
        raise ConfigError(problems)
    return {name: sources[name] for name in config.sources if name in sources}


def _first(name: str, candidates: Sequence[Source]) -> Source:
    """The first candidate that is there; the last one's message where none is."""
    for candidate in candidates[:-1]:
        if Path(getattr(candidate, "root", "")).expanduser().exists():
            return candidate
    last = candidates[-1]
    root = getattr(last, "root", None)
    if root is not None and "://" not in root and not Path(root).expanduser().exists():
        tried = ", ".join(str(getattr(c, "root", "")) for c in candidates)
        raise UserError(
            f"benchmark.sources.{name}: nothing there (looked for {tried}); "
            "say where the files are with benchmark.root=DIR"
        )
    return last


def _rows(name: str, source: Source) -> list[_Row]:
    table = source.index()
    if not table.num_rows:
        raise UserError(f"benchmark.sources.{name}: no image in it")
    columns = (table[c].to_pylist() for c in ("key", "class_name", "domain", "split"))
    return [
        _Row(name, key, class_name, domain, split or _drawn_split(key))
        for key, class_name, domain, split in zip(*columns, strict=True)
    ]


def _drawn_split(key: str) -> str:
    """The split of an image whose source has none."""
    return "train" if _hash("split", key) < 0.8 else "test"


def _hash(salt: str, key: str) -> float:
    """A number in [0, 1) that depends on `key` alone; `salt` makes independent ones."""
    whole = hashlib.sha256(f"{salt}-v1/{key}".encode()).digest()[:8]
    return int.from_bytes(whole, "big") / 2**64


def _choose(
    config: BenchmarkConfig, name: str, chosen: SetConfig, rows: Mapping[str, list[_Row]]
) -> Iterator[_Row]:
    classes = None if chosen.classes is None else set(_class_list(config, name, chosen.classes))
    not_classes = set(_class_list(config, name, chosen.not_classes))
    not_keys = set(_class_list(config, name, chosen.not_keys))
    low, high = chosen.fraction
    for source in chosen.source:
        for row in rows[source]:
            if (
                (classes is None or row.class_name in classes)
                and row.class_name not in not_classes
                and row.key not in not_keys
                and (chosen.domains is None or row.domain in chosen.domains)
                and row.domain not in chosen.not_domains
                and (chosen.splits is None or row.split in chosen.splits)
                and ((low, high) == (0, 1) or low <= _hash("fraction", row.key) < high)
            ):
                yield row


def _class_list(config: BenchmarkConfig, name: str, classes: Iterable[str]) -> Iterator[str]:
    for entry in classes:
        if entry == "id":
            yield from config.class_names
        elif "#" in entry:
            try:
                yield from read_list(entry)
            except UserError as error:
                raise UserError(f"set {name!r}: {error}") from None
        else:
            yield entry


def _cap(rows: Iterable[_Row], per_class: int | Mapping[str, int] | None) -> list[_Row]:
    """At most so many rows of each class, taken in turn from its domains, by key's hash."""
    rows = sorted(rows, key=lambda row: row.key)
    if per_class is None:
        return rows
    classes: dict[str | None, dict[str | None, list[_Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: _hash("order", row.key)):
        classes[row.class_name][row.domain].append(row)
    kept: list[_Row] = []
    for class_name, domains in classes.items():
        ordered = [domains[d] for d in sorted(domains, key=str)]
        in_turn = [row for turn in zip_longest(*ordered) for row in turn if row is not None]
        many = per_class if isinstance(per_class, int) else per_class.get(str(class_name))
        kept += in_turn[:many]
    return sorted(kept, key=lambda row: row.key)


def _selection(config: BenchmarkConfig, name: str, rows: Sequence[_Row]) -> Selection:
    if not rows:
        raise UserError(f"set {name!r} of benchmark {config.name!r}: no image fits its conditions")
    number = {class_name: k for k, class_name in enumerate(config.class_names)}
    role = SetName.parse(name).role
    labelled = role in (*ID_ROLES, *SHIFTED_ROLES)
    labels = []
    for row in rows:
        if labelled and row.class_name not in number:
            raise UserError(
                f"set {name!r}: {row.key} has the class {row.class_name!r}, which is not in "
                f"class_names ({_some(config.class_names)})"
            )
        labels.append(number[str(row.class_name)] if labelled else NO_LABEL)
    missing = set(number.values()) - set(labels)
    if role in ID_ROLES and missing and config.every_class:
        names = _some([config.class_names[k] for k in sorted(missing)])
        raise UserError(f"set {name!r} of benchmark {config.name!r}: no image of class {names}")
    if not labelled:
        known = {plain(class_name) for class_name in number}
        seen = {row.class_name for row in rows if row.class_name is not None}
        overlap = {class_name for class_name in seen if plain(class_name) in known}
        if overlap:
            raise UserError(
                f"set {name!r}: its class {', '.join(sorted(map(str, overlap)))} is an ID class; "
                "an image of a known class is not OOD (leave it out with not_classes)"
            )
    return Selection(
        tuple(row.source for row in rows), tuple(row.key for row in rows), tuple(labels)
    )


def _some(names: Sequence[str]) -> str:
    """The names, of many the first ones."""
    more = f", ... {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _too_few(
    counts: Mapping[str | None, int], limits: Mapping[str, int] | None, words: str
) -> list[str]:
    """What is said where some class has fewer images than are to be taken of it."""
    short = {c: counts.get(c, 0) for c, n in (limits or {}).items() if 0 < counts.get(c, 0) < n}
    if not short:
        return []
    have = _some([f"{c}: {n}" for c, n in short.items()])
    return [f"{words}: more than there are ({have}); shots=null takes all"]


def _refuse_shared_images(
    config: BenchmarkConfig, sets: Mapping[str, Selection], prints: Mapping[str, str]
) -> None:
    """No image serves two purposes: train, choose, test. Equal sources count as one."""
    owner: dict[tuple[str, str], str] = {}
    for name, chosen in sets.items():
        for source, key in zip(chosen.sources, chosen.keys, strict=True):
            first = owner.setdefault((prints[source], key), name)
            if first != name:
                raise UserError(
                    f"benchmark {config.name!r}: {key} is in {first!r} and in {name!r}; "
                    "sets must not share images"
                )


def _refuse_shared_classes(config: BenchmarkConfig, classes: Mapping[str, set[str]]) -> None:
    """What training or the choice of settings has seen as an outlier is no test of OOD."""
    for name, seen in classes.items():
        if SetName.parse(name).role not in ("outliers", "validation_ood"):
            continue
        for other, tested in classes.items():
            shared = sorted(seen & tested)
            if SetName.parse(other).role == "ood" and shared:
                raise UserError(
                    f"benchmark {config.name!r}: {name!r} and {other!r} share the class "
                    f"{', '.join(shared)}; a test set must show classes never seen before"
                )
