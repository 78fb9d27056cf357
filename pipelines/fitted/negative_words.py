"""Words that are no class, from a stored list to the mined negatives of a benchmark.

`negative_classes=` names a list: a file with a word a line, one in conf/negative_classes/, or a
folder with WordNet's words in files by lexicographer (`noun.animal.txt`, `adj.all.txt`). The words
are encoded by the backbone's text tower; words that are class names are dropped;
`pipelines.ood.negatives` chooses among the rest, among nouns and adjectives apart. What was chosen
is kept as the record of the score neg_label:

    cache/fitted/ADDRESS/record.safetensors   text features of the chosen words
    cache/fitted/ADDRESS/manifest.json        the chosen words, the farthest of each kind first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.code_digest import Code, code_of
from pipelines.config import CONF, UserError, digest
from pipelines.data.storage import Storage
from pipelines.embed.text import text_code, text_features
from pipelines.ood.negatives import NegativeLabels, mine_negatives
from pipelines.score.by_name import NEG_LABEL
from pipelines.score.cache import FittedManifest, is_fitted, write

# What is made of the words of a folder.
Pool: TypeAlias = Literal["words", "csp"]

LISTS = CONF / "negative_classes"


# An adjective is no name of a thing: its prompt in the public code of Jiang 2024.
ADJECTIVE_TEMPLATES = ("This is a {} photo",)
# Chen 2024: an adjective with one of these words is a name of a cluster of things. The words, the
# prompts of such a name, the files that are left out and the bound are those of its public code.
SUPERCLASSES = (
    "environment", "space", "object", "scene", "place", "item", "area", "view", "thing", "pattern",
    "structure", "landscape", "vista", "creature",
)  # fmt: skip
PHRASE_TEMPLATES = ("{}", "a nice photo of {}", "a good photo of {}", "a close-up photo of {}")
CSP_LEAVES_OUT = ("noun.person", "noun.quantity", "noun.group", "adj.pert")
CSP_MAX_COSINE = 0.95


@dataclass(frozen=True)
class Candidates:
    """Words of one kind, of which the farthest are chosen apart from those of other kinds.

    Attributes:
        words: each once.
        templates: of their prompts; None: the benchmark's.
        max_cosine: with a class, above which a word is one of its names.
    """

    words: tuple[str, ...]
    templates: tuple[str, ...] | None = None
    max_cosine: float = 1.0

    @property
    def what(self) -> list[object]:
        """What decides which words are chosen, for addresses."""
        return [list(self.words), self.templates and list(self.templates), self.max_cosine]


def words_code() -> Code:
    """The code that can decide which words are chosen of a list."""
    return code_of(mine_negatives, NegativeLabels, alone=(keep,))


def read_words(name: str, pool: Pool = "words") -> tuple[Candidates, ...]:
    """The words of a list, each once, in its order; empty lines and lines with # are left out.

    Args:
        name: a list in conf/negative_classes/, a file or a folder.
        pool: what is made of the adjectives of a folder.

    Raises:
        UserError: where there is no such list, no word in it, or it is no folder and `pool` needs
            one.
    """
    given, shipped = Path(name).expanduser(), LISTS / f"{name}.txt"
    if given.is_dir():
        return _read_folder(given, pool)
    if pool == "csp":
        raise UserError(
            f"negative_pool=csp, negative_classes={name}: it takes a folder with nouns and "
            "adjectives in files noun.*.txt and adj.*.txt"
        )
    path = given if given.is_file() else shipped
    try:
        kept = _read(path)
    except (OSError, UnicodeDecodeError):
        known = ", ".join(sorted(file.stem for file in LISTS.glob("*.txt")))
        raise UserError(
            f"negative_classes={name}: no such file of words, one a line, no folder of them, and "
            f"no list of that name; lists here: {known}"
        ) from None
    if not kept:
        raise UserError(f"negative_classes={name}: no word in {path}")
    return (Candidates(kept),)


def _read_folder(folder: Path, pool: Pool) -> tuple[Candidates, ...]:
    """Nouns in the benchmark's templates and adjectives in their own, or as phrases."""
    left_out = CSP_LEAVES_OUT if pool == "csp" else ()
    words: dict[str, dict[str, None]] = {"noun": {}, "adj": {}}
    for path in sorted(folder.glob("*.txt")):
        kind = path.name.split(".")[0]
        if kind in words and path.stem not in left_out:
            try:
                words[kind] |= dict.fromkeys(_read(path))
            except (OSError, UnicodeDecodeError):
                raise UserError(f"negative_classes={folder}: {path.name} is no text") from None
    if not any(words.values()):
        raise UserError(
            f"negative_classes={folder}: no word in files noun.*.txt and adj.*.txt of this folder"
        )
    nouns, adjectives = (tuple(found) for found in words.values())
    if pool == "words":
        kinds = Candidates(nouns), Candidates(adjectives, ADJECTIVE_TEMPLATES)
    else:
        phrases = tuple(f"{word} {_superclass(word)}" for word in adjectives)
        kinds = (
            Candidates(nouns, None, CSP_MAX_COSINE),
            Candidates(phrases, PHRASE_TEMPLATES, CSP_MAX_COSINE),
        )
    return tuple(kind for kind in kinds if kind.words)


def _superclass(adjective: str) -> str:
    """One of `SUPERCLASSES`, drawn by the word: a list that grows keeps its phrases."""
    return SUPERCLASSES[int(digest(adjective), 16) % len(SUPERCLASSES)]


def _read(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    words = [line.strip().replace("_", " ") for line in lines if not line.startswith("#")]
    return tuple(dict.fromkeys(word for word in words if word))


def keep(
    candidates: Sequence[Candidates],
    class_names: Sequence[str],
    templates: Sequence[str],
    backbone: BackboneConfig,
    storage: Storage,
) -> str:
    """Mine the negatives of these classes, once; gives the address of the record.

    Args:
        candidates: words by kind.
        class_names: of the benchmark; no negative is one of them, whatever its case.
        templates: that classes are encoded in, and words without templates of their own.
        backbone: resolved.
        storage: where records and text features are kept.

    Raises:
        UserError: where every word of a kind is a class name.
    """
    others = [replace(kind, words=_no_class(kind.words, class_names)) for kind in candidates]
    what = [[kind.what for kind in others], list(class_names), list(templates)]
    code = [words_code().digest, text_code(backbone).digest]
    address = digest(["negative labels", *what, dict(network.identity(backbone)), *code])
    if is_fitted(storage, address):
        return address
    classes = torch.from_numpy(text_features(class_names, templates, backbone, storage).copy())
    features, mined = [], []
    for kind in others:
        encoded = _encoded(kind, templates, backbone, storage)
        chosen = mine_negatives(encoded, classes, max_cosine=kind.max_cosine)
        features.append(encoded[chosen])
        mined += [kind.words[place] for place in chosen.tolist()]
    count = sum(len(kind.words) for kind in others)
    manifest = FittedManifest(score=NEG_LABEL, candidates=count, words=tuple(mined))
    write(storage, address, NegativeLabels(torch.cat(features)), manifest)
    return address


def corpus_features(
    candidates: Sequence[Candidates],
    class_names: Sequence[str],
    templates: Sequence[str],
    backbone: BackboneConfig,
    storage: Storage,
) -> Tensor:
    """Unit text features (M, D) of all words that are no class, chosen or not.

    Takes what `keep` takes, and raises what it raises.
    """
    others = [replace(kind, words=_no_class(kind.words, class_names)) for kind in candidates]
    return torch.cat([_encoded(kind, templates, backbone, storage) for kind in others])


def _encoded(
    kind: Candidates, templates: Sequence[str], backbone: BackboneConfig, storage: Storage
) -> Tensor:
    own = kind.templates or templates
    return torch.from_numpy(text_features(kind.words, own, backbone, storage).copy())


def _no_class(words: Sequence[str], class_names: Sequence[str]) -> tuple[str, ...]:
    """The words that are no class, whatever their case."""
    known = {name.casefold().replace("_", " ") for name in class_names}
    others = tuple(w for w in words if w.casefold().replace("_", " ") not in known)
    if not others:
        raise UserError("negative_classes: every word of the list is a class name; give others")
    return others
