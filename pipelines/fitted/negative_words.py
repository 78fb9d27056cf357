"""Words that are no class, from a stored list to the mined negatives of a benchmark.

`negative_classes=` names a list: a file with a word a line, one in conf/negative_classes/, a folder
with WordNet's words in files by lexicographer (`noun.animal.txt`, `adj.all.txt`), or one with its
database, whose words near the classes are taken (`negative_pool=near`). The words are encoded by
the backbone's text tower; words that are class names are dropped; `pipelines.ood.negatives` chooses
among the rest, among nouns and adjectives apart. What was chosen is kept as the record of the score
neg_label:

    cache/fitted/ADDRESS/record.safetensors   text features of the chosen words
    cache/fitted/ADDRESS/manifest.json        the chosen words, the farthest of each kind first
"""

from __future__ import annotations

import functools
import logging
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
from pipelines.fitted.wordnet import near_words
from pipelines.ood.negatives import NegativeLabels, all_but_names, mine_negatives
from pipelines.score.by_name import NEG_LABEL
from pipelines.score.cache import FittedManifest, is_fitted, write

# What is made of the words of a folder.
Pool: TypeAlias = Literal["words", "csp", "near"]

logger = logging.getLogger(__name__)

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
# A relative of a class is one of its names by the same bound.
NEAR_MAX_COSINE = CSP_MAX_COSINE


@dataclass(frozen=True)
class Candidates:
    """Words of one kind; the choice among them is made apart from that among other kinds.

    Attributes:
        words: each once.
        templates: of their prompts; None: the benchmark's.
        max_cosine: with a class, above which a word is one of its names.
        are_near: all are chosen but such names; else the farthest.
    """

    words: tuple[str, ...]
    templates: tuple[str, ...] | None = None
    max_cosine: float = 1.0
    are_near: bool = False

    @property
    def what(self) -> list[object]:
        """What decides which words are chosen, for addresses."""
        rule = ["near"] if self.are_near else []
        return [list(self.words), self.templates and list(self.templates), self.max_cosine, *rule]


def words_code() -> Code:
    """The code that can decide which words are chosen of a list."""
    return code_of(mine_negatives, all_but_names, NegativeLabels, alone=(keep,))


def read_words(
    name: str, pool: Pool = "words", class_names: Sequence[str] = ()
) -> tuple[Candidates, ...]:
    """The words of a list, each once, in its order; empty lines and lines with # are left out.

    Args:
        name: a list in conf/negative_classes/, a file or a folder.
        pool: what is made of a folder's adjectives, or `near`: relatives of the classes, of a
            folder with WordNet's database.
        class_names: of the benchmark's ID classes, which `near` alone reads.

    Raises:
        UserError: where there is no such list, no word in it, or it is no folder and `pool` needs
            one.
    """
    given, shipped = Path(name).expanduser(), LISTS / f"{name}.txt"
    if pool == "near":
        return _read_relatives(given, class_names)
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


def _read_relatives(folder: Path, class_names: Sequence[str]) -> tuple[Candidates, ...]:
    words, without = near_words(folder, class_names)
    if not words:
        raise UserError(
            f"negative_pool=near, negative_classes={folder}: no class has a relative there; names "
            "are looked up as they are and by their last word, as nouns"
        )
    if without:
        names = ", ".join(without[:20]) + (", ..." if len(without) > 20 else "")
        _say(
            f"negative_pool=near: {len(without)} of {len(class_names)} classes have no entry in "
            f"{folder}, so that no word is near them and none of their kinds is left out: {names}"
        )
    return (Candidates(words, None, NEAR_MAX_COSINE, are_near=True),)


@functools.cache  # a run reads its words several times
def _say(line: str) -> None:
    logger.warning("%s", line)


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
        UserError: where every word of a kind is a class name, by its letters or by its cosine.
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
        chosen = _chosen(kind, encoded, classes)
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


def _chosen(kind: Candidates, encoded: Tensor, classes: Tensor) -> Tensor:
    """Places of the chosen words of a kind, the farthest first, by unit text features."""
    if not kind.are_near:
        return mine_negatives(encoded, classes, max_cosine=kind.max_cosine)
    chosen = all_but_names(encoded, classes, max_cosine=kind.max_cosine)
    if not len(chosen):
        raise UserError(
            f"negative_pool=near: every word has a cosine above {kind.max_cosine} with a class; "
            "this backbone tells none of them from the classes"
        )
    return chosen


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
