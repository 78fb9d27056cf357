"""Lists of words, what is made of them, and which are chosen: as the public codes choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.fitted import negative_words
from pipelines.fitted.negative_words import Candidates, corpus_features, keep, read_words
from pipelines.ood.negatives import all_but_names, mine_negatives
from pipelines.score import by_name as scoring
from tests.wordnet_files import write_database


def rows(count: int, first: int) -> Tensor:
    """Unit rows (count, 16) that follow from their numbers."""
    i, j = np.arange(first, first + count)[:, None], np.arange(16)[None, :]
    x = np.sin(0.7 * i * (j + 1) + 0.3 * j * j) + 0.6
    return torch.tensor((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


# Chosen by the authors' own lines (XueJiang16/NegLabel and MengyuanChen21/NeurIPS2024-CSP,
# mmcls/models/classifiers/multi_modal.py) among the rows below, 30 % of nouns and adjectives each.
# Nouns 5 and 17 and adjective 11 are names of classes that are unlike the others: Jiang 2024
# chooses them first, Chen 2024 leaves them out.
JIANG_NOUNS = [5, 17, 41, 32, 50, 59, 23, 53, 44, 14, 34, 25, 43, 35, 52, 51, 16, 0]
CHEN_NOUNS = [41, 32, 50, 59, 23, 53, 44, 14, 34, 25, 43, 35, 52, 51, 16, 0, 7, 42]
JIANG_ADJECTIVES = [11, 6, 15, 24, 39, 7, 33, 16, 42, 30, 18, 25, 8, 9]
CHEN_ADJECTIVES = [6, 15, 24, 39, 7, 33, 16, 42, 30, 18, 25, 8, 9, 17]


def test_chosen_as_by_the_authors_own_lines() -> None:
    nouns, adjectives, classes = rows(60, 0), rows(47, 1000), rows(60, 500)
    classes[[2, 8, 58]] *= -1
    for words, word, label in ((nouns, 5, 2), (nouns, 17, 8), (adjectives, 11, 58)):
        near = classes[label] + 0.02 * words[word]
        words[word] = near / near.norm()
    for words, jiang, chen in (
        (nouns, JIANG_NOUNS, CHEN_NOUNS),
        (adjectives, JIANG_ADJECTIVES, CHEN_ADJECTIVES),
    ):
        assert mine_negatives(words, classes, share=0.3).tolist() == jiang
        assert mine_negatives(words, classes, share=0.3, max_cosine=0.95).tolist() == chen


def test_blocks_of_words_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    words, classes = rows(100, 0), rows(7, 300)
    whole = mine_negatives(words, classes, share=1.0, max_cosine=0.9)
    monkeypatch.setattr("pipelines.ood.negatives._BLOCK", 9)
    assert torch.equal(mine_negatives(words, classes, share=1.0, max_cosine=0.9), whole)


def test_near_words_are_all_but_names_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines 1, 0.96, 0.94, 0.6 and -1 with one class; the other is at a right angle."""
    cosines = [0.6, 1.0, 0.94, -1.0, 0.96]
    words = torch.tensor([[c, 0.0, (1 - c * c) ** 0.5] for c in cosines])
    classes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for block in (4096, 2):
        monkeypatch.setattr("pipelines.ood.negatives._BLOCK", block)
        assert all_but_names(words, classes, max_cosine=0.95).tolist() == [3, 0, 2]
    assert all_but_names(words, classes, max_cosine=0.99).tolist() == [3, 0, 2, 4]
    assert all_but_names(words[1:2], classes, max_cosine=0.95).tolist() == []
    with pytest.raises(ValueError, match="0 < max_cosine < 1"):
        all_but_names(words, classes, max_cosine=1.0)


def test_the_shipped_list() -> None:
    (found,) = read_words("nouns")
    assert found.templates is None
    assert len(found.words) > 500
    assert len(set(found.words)) == len(found.words)
    assert all(word == word.lower().strip() and " " not in word for word in found.words)


def test_own_lists_and_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# mine\nLake\n\nriver_bank\nLake\n")
    assert read_words(str(path)) == (Candidates(("Lake", "river bank")),)
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="no word in"):
        read_words(str(path))
    with pytest.raises(UserError, match=r"negative_classes=nope: .*lists here: nouns"):
        read_words("nope")
    with pytest.raises(UserError, match=r"negative_pool=csp, negative_classes=nouns: it takes a"):
        read_words("nouns", "csp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Words as WordNet's lexicographer files have them."""
    files = {
        "noun.animal.txt": "cat\npolar bear\ndog\n",
        "noun.plant.txt": "oak\ncat\n",
        "noun.person.txt": "baker\n",
        "adj.all.txt": "wooden\nred\n",
        "adj.pert.txt": "uric\n",
        "verb.motion.txt": "walk\n",
        "README.md": "no words\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_nouns_and_adjectives_of_a_folder(folder: Path) -> None:
    nouns, adjectives = read_words(str(folder))
    assert nouns == Candidates(("cat", "polar bear", "dog", "baker", "oak"))
    assert adjectives == Candidates(("wooden", "red", "uric"), ("This is a {} photo",))


def test_the_conjugated_pool_names_things_by_adjectives(folder: Path) -> None:
    nouns, phrases = read_words(str(folder), "csp")
    assert nouns == Candidates(("cat", "polar bear", "dog", "oak"), None, 0.95)
    adjectives, things = zip(*(phrase.split() for phrase in phrases.words), strict=True)
    assert adjectives == ("wooden", "red")
    assert set(things) <= set(negative_words.SUPERCLASSES)
    assert len(phrases.templates or ()) == 4
    # A word that comes later moves no phrase, and all of the names are drawn.
    many = "\n".join(f"word{number}" for number in range(300))
    (folder / "adj.ppl.txt").write_text(many)
    _, more = read_words(str(folder), "csp")
    assert more.words[:2] == phrases.words
    assert {phrase.split()[1] for phrase in more.words} == set(negative_words.SUPERCLASSES)


def test_a_folder_without_words_or_text(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match=r"no word in files noun\.\*\.txt and adj\.\*\.txt"):
        read_words(str(folder))
    (folder / "noun.act.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"noun\.act\.txt is no text"):
        read_words(str(folder))


ANIMALS = {
    "animal": ("animal", ""),
    "dog": ("dog", "animal"),
    "hound": ("hound", "dog"),
    "wolf": ("wolf grey_wolf", "animal"),
    "bear": ("bear", "animal"),
    "polar_bear": ("polar_bear", "bear"),
}


def test_relatives_of_the_classes_of_wordnets_database(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(write_database(tmp_path, ANIMALS))
    expected = Candidates(("wolf", "grey wolf", "bear", "polar bear"), None, 0.95, are_near=True)
    assert read_words(name, "near", ["dog"]) == (expected,)
    assert not caplog.records
    for _ in range(2):  # a run reads its words several times, and says this once
        assert read_words(name, "near", ["dog", "striped"]) == (expected,)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "1 of 2 classes have no entry in" in line
    assert line.endswith("none of their kinds is left out: striped")
    with pytest.raises(UserError, match=r"no class has a relative there; names are looked up"):
        read_words(name, "near", ["animal"])
    with pytest.raises(UserError, match=r"negative_classes=nouns: it takes a folder with WordNet"):
        read_words("nouns", "near", ["dog"])


def test_near_words_are_kept_though_they_are_near(
    tmp_path: Path, backbone_files: dict[str, tuple[Path, Path]]
) -> None:
    config, path = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(config), path=str(path))
    storage, known, templates = Storage(str(tmp_path)), ("dog", "bear"), ("a {}.",)
    loaded = network.load(backbone)

    def features(*names: str) -> Tensor:
        encoded = loaded.encode_text([f"a {name}." for name in names])
        return encoded / encoded.norm(dim=1, keepdim=True)

    words = ("wolf", "Bear", "grey wolf", *(f"thing {n}" for n in range(9)))
    others = [word for word in words if word != "Bear"]
    nearest = (features(*others) @ features(*known).T).amax(dim=1).tolist()
    low, high = sorted(nearest)[3:5]  # a bound between two words: four are no name of a class
    near = Candidates(words, None, (low + high) / 2, are_near=True)
    address = keep([near], known, templates, backbone, storage)
    manifest = storage.read_json("cache", "fitted", address, "manifest.json")
    wanted = {word for word, cosine in zip(others, nearest, strict=True) if cosine <= low}
    assert len(wanted) == 4
    assert set(manifest["words"]) == wanted
    assert manifest["candidates"] == len(others)
    names = Candidates(("wolf",), None, nearest[0] / 2, are_near=True)
    with pytest.raises(UserError, match=r"negative_pool=near: every word has a cosine above 0\."):
        keep([names], known, templates, backbone, storage)


def test_words_of_the_backbones_own_tower_without_class_names(
    tmp_path: Path, backbone_files: dict[str, tuple[Path, Path]]
) -> None:
    config, path = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(config), path=str(path))
    storage, known = Storage(str(tmp_path)), ("dog", "polar_bear")
    templates = ("a {}.", "one {}.")
    nouns = Candidates(("Dog", "polar bear", *(f"thing {n}" for n in range(20))))
    adjectives = Candidates(tuple(f"quality {n}" for n in range(14)), ("It is {}",))
    address = keep([nouns, adjectives], known, templates, backbone, storage)
    manifest = storage.read_json("cache", "fitted", address, "manifest.json")
    assert manifest["candidates"] == 34
    assert [word.split()[0] for word in manifest["words"]] == ["thing"] * 3 + ["quality"] * 2
    loaded = network.load(backbone)
    kept = scoring.from_bytes(
        "neg_label", storage.read_bytes("cache", "fitted", address, "record.safetensors")
    )
    for word, row in zip(manifest["words"], kept.text_features, strict=True):
        own = templates if word.startswith("thing") else ("It is {}",)
        mean = loaded.encode_text([t.format(word) for t in own]).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-6)
    corpus = corpus_features([nouns, adjectives], known, templates, backbone, storage)
    assert len(corpus) == 34
    assert {tuple(row) for row in kept.text_features.tolist()} < set(map(tuple, corpus.tolist()))
    with pytest.raises(UserError, match="every word of the list is a class name"):
        keep([Candidates(("DOG",))], known, templates, backbone, storage)


def test_what_is_made_of_a_folder_is_part_of_the_address(folder: Path, tmp_path: Path) -> None:
    both = [[kind.what for kind in read_words(str(folder), pool)] for pool in ("words", "csp")]
    assert both[0] != both[1]
    apart = [
        Candidates(("a",)),
        Candidates(("a",), ("{}",)),
        Candidates(("a",), None, 0.9),
        Candidates(("a",), None, 0.9, are_near=True),
    ]
    assert len({str(kind.what) for kind in apart}) == 4
