"""Near relatives of classes: words beside them in WordNet, read from its own database files.

The files are data.noun and index.noun of the folder dict/ that Princeton distributes; wndb(5WN) of
WordNet's manual defines them. A line of index.noun is a lemma with the byte offsets of its senses
in data.noun, the most frequent first. A line of data.noun is a synset: one meaning, with all its
words and with pointers to other synsets. Lines that begin with a space are the licence.

What a name means is its first sense that is a kind of thing: an individual, which has an instance
hypernym ("Crane, Stephen Crane"), is no class of images. So many animals are also names for
persons ("fox") that all senses of a word would leave little beside the class "person".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import UserError

# Steps from another hyponym of a class's hypernym down to its own hyponyms. Chosen, not measured.
DEPTH = 2
# Pointer symbols of wndb(5WN).
HYPERNYM, HYPONYM = "@", "~"
INSTANCE_HYPERNYM = "@i"  # of an individual


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        words: with spaces, in the case that the lexicographers gave them.
        pointers: symbol and byte offset, to nouns only.
    """

    words: tuple[str, ...]
    pointers: tuple[tuple[str, int], ...]

    def to(self, *symbols: str) -> list[int]:
        """Byte offsets of the synsets that pointers with these symbols lead to."""
        return [offset for symbol, offset in self.pointers if symbol in symbols]


@dataclass(frozen=True)
class Nouns:
    """The nouns of a database; a line is read when it is asked for, and refused if malformed.

    Attributes:
        folder: of the two files.
        data: of data.noun, to which byte offsets refer.
        index: lines of index.noun by lemma.
    """

    folder: Path
    data: bytes
    index: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path) -> Nouns:
        """The database of a folder.

        Raises:
            UserError: where one of the files is not there, no text or without a lemma.
        """
        try:
            data, text = ((folder / name).read_bytes() for name in ("data.noun", "index.noun"))
            lines = [line for line in text.decode().splitlines() if not line.startswith(" ")]
        except (OSError, UnicodeDecodeError):
            lines = []
        if not lines:
            raise UserError(
                f"negative_pool=near, negative_classes={folder}: it takes a folder with WordNet's "
                "database files data.noun and index.noun (dict/ of Princeton's archive)"
            )
        return cls(folder, data + b"\n", {line.partition(" ")[0]: line for line in lines})

    def synset(self, offset: int) -> Synset:
        """The synset at that byte of data.noun.

        Raises:
            UserError: where no synset begins there.
        """
        line = self.data[max(offset, 0) : self.data.find(b"\n", max(offset, 0))]
        try:
            fields = line.decode().partition(" | ")[0].split()
            end = 4 + 2 * int(fields[3], 16)  # the number of words is hexadecimal
            pointers = fields[end + 1 :]
            rows = list(zip(*(pointers[n::4] for n in range(4)), strict=True))
            found = Synset(
                tuple(word.replace("_", " ") for word in fields[4:end:2]),
                tuple((symbol, int(to)) for symbol, to, part, _ in rows if part == "n"),
            )
            is_whole = found.words and len(rows) == int(fields[end])
            if not is_whole or int(fields[0]) != offset or fields[2] != "n":
                raise ValueError
        except (ValueError, IndexError):
            raise self._malformed(f"no synset at byte {offset:08d} of data.noun") from None
        return found

    def senses(self, lemma: str) -> list[int]:
        """Byte offsets of the lemma's synsets, the most frequent sense first; none: no entry.

        Raises:
            UserError: where its line is malformed.
        """
        if lemma not in self.index:
            return []
        fields = self.index[lemma].split()
        try:
            count, start = int(fields[2]), 6 + int(fields[3])
            offsets = [int(offset) for offset in fields[start:]]
            if fields[1] != "n" or len(offsets) != count or not offsets:
                raise ValueError
        except (ValueError, IndexError):
            raise self._malformed(f"the line of {lemma!r} in index.noun") from None
        return offsets

    def meaning(self, name: str) -> int | None:
        """The first sense of a name, or else of its last word, that is no individual."""
        lemma = name.lower().replace(" ", "_")
        for form in (lemma, lemma.rpartition("_")[2]):
            for offset in self.senses(form):
                if not self.synset(offset).to(INSTANCE_HYPERNYM):
                    return offset
        return None

    def reached(
        self, start: Iterable[int], *symbols: str, steps: float = math.inf
    ) -> dict[int, Synset]:
        """The synsets of `start` and those at most so many pointers on, the nearest first."""
        found = {offset: self.synset(offset) for offset in start}
        edge = list(found.values())
        while edge and steps > 0:
            beyond = dict.fromkeys(offset for synset in edge for offset in synset.to(*symbols))
            new = {offset: self.synset(offset) for offset in beyond if offset not in found}
            found |= new
            edge, steps = list(new.values()), steps - 1
        return found

    def _malformed(self, what: str) -> UserError:
        return UserError(
            f"negative_classes={self.folder}: {what} is not as wndb(5WN) defines it; take both "
            "files of one version, byte by byte as Princeton distributes them"
        )


def near_words(folder: Path, class_names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Words beside the classes in WordNet, and the classes that have no entry there.

    Co-hyponyms of a class are the other hyponyms of its direct hypernyms. They and their own
    hyponyms, `DEPTH` steps down, are its relatives; individuals are none. Left out are the
    synonyms of every class, its hyponyms at any depth (a kind of the class is the class), its
    hypernyms at any height (which contain the class), and words that mean one of these first.

    Args:
        folder: with data.noun and index.noun.
        class_names: of the ID classes, the only names that are looked up.

    Returns:
        words, each once, the nearest relatives first; class names.

    Raises:
        UserError: where a file is not there or malformed.
    """
    nouns = Nouns.open(folder)
    meanings = {name: nouns.meaning(name) for name in class_names}
    classes = nouns.reached(offset for offset in meanings.values() if offset is not None)
    left_out = nouns.reached(classes, HYPONYM) | nouns.reached(classes, HYPERNYM)
    parents = [parent for synset in classes.values() for parent in synset.to(HYPERNYM)]
    siblings = [hyponym for parent in parents for hyponym in left_out[parent].to(HYPONYM)]
    words = dict.fromkeys(
        word
        for offset, synset in nouns.reached(siblings, HYPONYM, steps=DEPTH).items()
        for word in synset.words
        if offset not in left_out and nouns.meaning(word) not in left_out
    )
    return tuple(words), [name for name, offset in meanings.items() if offset is None]
