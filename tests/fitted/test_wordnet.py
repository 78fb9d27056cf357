"""Relatives of classes in a small WordNet database: which words, which meaning, which faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.fitted.wordnet import Nouns, Synset, near_words
from tests.wordnet_files import write_database

# By name: words, names of hypernyms. The offset of a name's first sense may be the larger one.
SYNSETS = {
    "entity": ("entity", ""),
    "organism": ("organism being", "entity"),
    "person": ("person individual", "organism"),
    "author": ("Crane Stephen_Crane", "i:person"),
    "frump": ("frump dog", "person"),
    "animal": ("animal beast", "organism"),
    "canine": ("canine canid", "animal"),
    "pet": ("domestic_animal", "animal"),
    "feline": ("feline", "animal"),
    "bird": ("bird", "animal"),
    "crane_bird": ("crane", "bird"),
    "whooper": ("whooping_crane", "crane_bird"),
    "heron": ("heron", "bird"),
    "dog": ("dog domestic_dog Canis_familiaris", "canine pet"),
    "hound": ("hound", "dog"),
    "beagle": ("beagle", "hound"),
    "wolf": ("wolf", "canine"),
    "romulus_wolf": ("Lupa", "i:wolf"),
    "timber_wolf": ("timber_wolf grey_wolf", "wolf"),
    "white_wolf": ("white_wolf", "timber_wolf"),
    "ellesmere": ("Ellesmere_wolf", "white_wolf"),
    "wolf_dog": ("wolfdog", "wolf dog"),
    "hyena": ("hyena beast", "canine"),
    "house_cat": ("house_cat", "pet feline"),
    "lion": ("lion", "feline"),
}
FIRST = {"dog": "dog", "crane": "author"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_database(tmp_path, SYNSETS, FIRST)


@pytest.mark.parametrize(
    ("class_names", "expected"),
    [
        # Beside dog: three levels below canine and domestic animal, without its kinds (hound,
        # beagle, wolfdog), the fourth (Ellesmere wolf), individuals (Lupa), and what contains it:
        # beast, another word for animal, though it is a word for hyena, too.
        (["dog"], "wolf, hyena, house cat, timber wolf, grey wolf, white wolf"),
        (["Domestic dog"], "wolf, hyena, house cat, timber wolf, grey wolf, white wolf"),
        # No class is beside another one, nor a kind of it.
        (["dog", "wolf"], "hyena, house cat"),
        (["wolf", "house_cat"], "dog, domestic dog, Canis familiaris, hyena, lion, hound, beagle"),
        # What contains a class (animal, feline) is not beside another one; what lies below it is.
        (
            ["person", "lion"],
            "house cat, canine, canid, domestic animal, bird, dog, domestic dog, "
            "Canis familiaris, wolf, hyena, crane, heron",
        ),
        # Of a name that is not there, the last word.
        (["mighty dog"], "wolf, hyena, house cat, timber wolf, grey wolf, white wolf"),
        # An author is no class: the bird. No kind of it is near another bird.
        (["crane"], "heron"),
        (["crane", "heron"], ""),
        (["lion"], "house cat"),
    ],
)
def test_words_beside_the_classes(folder: Path, class_names: list[str], expected: str) -> None:
    words, without = near_words(folder, class_names)
    assert ", ".join(words) == expected
    assert without == []


def test_animals_that_are_names_for_persons_stay_beside_persons(folder: Path) -> None:
    """A dog is a person by a rare sense (frump); a word means its first one."""
    words, _ = near_words(folder, ["person"])
    assert {"animal", "beast", "dog", "domestic dog", "wolf", "lion"} <= set(words)
    assert not {"person", "individual", "frump", "organism", "entity", "Crane"} & set(words)
    assert len(words) == len(set(words))


def test_classes_without_an_entry_are_named(folder: Path) -> None:
    words, without = near_words(folder, ["striped", "dog", "very striped"])
    assert words == near_words(folder, ["dog"])[0]
    assert without == ["striped", "very striped"]
    assert near_words(folder, ["striped"]) == ((), ["striped"])


# Written by hand: eleven words are 0b, pointers to verbs and sources (0b01) are no relatives.
DATA = (
    "  1 A licence.  \n"
    "00000017 03 n 01 entity 0 001 ~ 00000082 n 0000 | all there is  \n"
    "00000082 03 n 0b thing 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 Big_Thing 1 "
    "003 @ 00000017 n 0000 + 00000017 v 0b01 ~i 00000239 n 0000 | what it says | twice  \n"
    "00000239 03 n 01 Thing 0 001 @i 00000082 n 0000 | one of them  \n"
)
INDEX = (
    "  1 A licence.  \n"
    "big_thing n 1 3 @ + ~i 1 0 00000082  \n"
    "entity n 1 1 ~ 1 1 00000017  \n"
    "thing n 2 4 @ + ~i @i 2 1 00000239 00000082  \n"
)


def test_the_lines_of_the_definition(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(DATA)
    (tmp_path / "index.noun").write_text(INDEX)
    nouns = Nouns.open(tmp_path)
    words = ("thing", *"bcdefghij", "Big Thing")
    assert nouns.synset(82) == Synset(words, (("@", 17), ("~i", 239)))
    assert nouns.synset(17) == Synset(("entity",), (("~", 82),))
    assert nouns.senses("thing") == [239, 82]
    assert nouns.senses("nothing") == []
    assert nouns.meaning("Thing") == 82
    assert nouns.meaning("a big thing") == 82


def replaced(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda folder: (folder / "data.noun").unlink(), "it takes a folder with WordNet's"),
        (lambda folder: (folder / "index.noun").unlink(), "data.noun and index.noun"),
        (lambda folder: (folder / "index.noun").write_bytes(b"\xff\xfe\n"), "it takes a folder"),
        (lambda folder: (folder / "index.noun").write_text("  1 A licence.\n"), "it takes a fold"),
        (lambda folder: (folder / "data.noun").write_text(""), "no synset at byte"),
        # Other ends of lines move every synset.
        (replaced("data.noun", "\n", "\r\n"), "no synset at byte"),
        (replaced("data.noun", " n 03 dog", " n 04 dog"), "no synset at byte"),
        (replaced("data.noun", " n 03 dog", " n 00 dog"), "no synset at byte"),
        (replaced("data.noun", " n 03 dog", " v 03 dog"), "no synset at byte"),
        (replaced("data.noun", "familiaris 0 004", "familiaris 0 005"), "no synset at byte"),
        (replaced("data.noun", "familiaris 0 004", "familiaris 0 xyz"), "no synset at byte"),
        (replaced("index.noun", "dog n 2", "dog n 3"), "the line of 'dog' in index.noun"),
        (replaced("index.noun", "dog n 2", "dog v 2"), "the line of 'dog' in index.noun"),
        (replaced("index.noun", "dog n 2", "dog n"), "the line of 'dog' in index.noun"),
    ],
)
def test_malformed_files_are_one_line(
    folder: Path, change: Callable[[Path], object], line: str
) -> None:
    assert near_words(folder, ["dog"])[0]
    change(folder)
    with pytest.raises(UserError, match=line) as error:
        near_words(folder, ["dog"])
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
