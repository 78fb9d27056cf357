"""Words that are no class, from a stored list to the mined negatives of a benchmark.

`negative_classes=` names a list: a file with a word a line, or one in conf/negative_classes/.
The words are encoded by the backbone's text tower in the benchmark's templates; words that
are class names are dropped; `pipelines.ood.negatives` chooses among the rest. What was chosen is
kept as the record of the score neg_label:

    cache/fitted/ADDRESS/record.safetensors   text features of the chosen words
    cache/fitted/ADDRESS/manifest.json        the chosen words, the farthest first
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.code_digest import Code, code_of
from pipelines.config import CONF, UserError, digest
from pipelines.data.storage import Storage
from pipelines.embed.text import text_code, text_features
from pipelines.ood.negatives import NegativeLabels, mine_negatives
from pipelines.score.by_name import NEG_LABEL
from pipelines.score.cache import FittedManifest, is_fitted, write

LISTS = CONF / "negative_classes"


def words_code() -> Code:
    """The code that can decide which words are chosen of a list."""
    return code_of(mine_negatives, NegativeLabels, alone=(keep,))


def read_words(name: str) -> tuple[str, ...]:
    """The words of a list, each once, in its order; empty lines and lines with # are left out.

    Raises:
        UserError: where there is no such list, or no word in it.
    """
    given, shipped = Path(name).expanduser(), LISTS / f"{name}.txt"
    path = given if given.is_file() else shipped
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        known = ", ".join(sorted(file.stem for file in LISTS.glob("*.txt")))
        raise UserError(
            f"negative_classes={name}: no such file of words, one a line, and no list of that "
            f"name; lists here: {known}"
        ) from None
    words = [line.strip() for line in lines]
    kept = tuple(dict.fromkeys(word for word in words if word and not word.startswith("#")))
    if not kept:
        raise UserError(f"negative_classes={name}: no word in {path}")
    return kept


def keep(
    words: Sequence[str],
    class_names: Sequence[str],
    templates: Sequence[str],
    backbone: BackboneConfig,
    storage: Storage,
) -> str:
    """Mine the negatives of these classes, once; gives the address of the record.

    Args:
        words: candidates.
        class_names: of the benchmark; no negative is one of them, whatever its case.
        templates: that classes and words are encoded in.
        backbone: resolved.
        storage: where records and text features are kept.

    Raises:
        UserError: where every word is a class name.
    """
    others = _no_class(words, class_names)
    what = [list(others), list(class_names), list(templates), dict(network.identity(backbone))]
    code = [words_code().digest, text_code(backbone).digest]
    address = digest(["negative labels", *what, *code])
    if is_fitted(storage, address):
        return address
    encoded = torch.from_numpy(text_features(others, templates, backbone, storage).copy())
    classes = torch.from_numpy(text_features(class_names, templates, backbone, storage).copy())
    chosen = mine_negatives(encoded, classes)
    mined = tuple(others[place] for place in chosen.tolist())
    manifest = FittedManifest(score=NEG_LABEL, candidates=len(others), words=mined)
    write(storage, address, NegativeLabels(encoded[chosen]), manifest)
    return address


def _no_class(words: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """The words that are no class, whatever their case."""
    known = {name.casefold().replace("_", " ") for name in class_names}
    others = [word for word in words if word.casefold().replace("_", " ") not in known]
    if not others:
        raise UserError("negative_classes: every word of the list is a class name; give others")
    return others
