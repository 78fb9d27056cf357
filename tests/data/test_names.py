"""Names that a path, a table and a terminal can bear, from the words of the command line on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs import main, pipeline, run_section
from pipelines.config import ConfigError, UserError, load
from pipelines.data.names import check_set, refuse_similar
from pipelines.data.storage import Storage
from pipelines.records import check_name, printable
from pipelines.settings.config import PipelineConfig

GOOD = ["ebm", "caltech101", "art_painting", "eight, nine (concept unknown)", "ViT-B.16", "a+b"]
BAD = [
    "",
    "../../x",
    "my/others",
    ".hidden",
    "a\nb",
    "a\x1b[2J",
    "a\\b",
    "a:b",
    " a",
    "é",
    "a" * 101,
]


def test_safe_names() -> None:
    for name in GOOD:
        check_name(name, "source")
    for name in BAD:
        with pytest.raises(
            ValueError, match=r"^source '.*': a name is a letter or digit"
        ) as caught:
            check_name(name, "source")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ood", "an OOD set is written ood/GROUP/NAME"),
        ("ood/", "an OOD set is written ood/GROUP/NAME"),
        ("ood//x", "an OOD set is written ood/GROUP/NAME"),
        ("ood/near/a/b", "a name is a letter or digit"),
        ("ood/../b", "a name is a letter or digit"),
        ("ood/mean/b", "the mean over all groups"),
        ("shifted/../../x", "a name is a letter or digit"),
        ("shifted/", "write it 'shifted'"),
        ("test/b", "there is one set 'test'"),
        ("train/b", "there is one set 'train'"),
    ],
)
def test_names_of_sets(name: str, said: str) -> None:
    with pytest.raises(ValueError, match="set") as caught:
        check_set(name)
    assert said in str(caught.value)


SOURCE = "{kind: digits}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [f"benchmark.sources={{digits: {SOURCE}, ../../x: {SOURCE}}}"],
            "source '../../x': a name",
        ),
        ([f"benchmark.sources={{digits: {SOURCE}, my/others: {SOURCE}}}"], "source 'my/others': a"),
        (["benchmark.sources={digits: []}"], "at least 1 item"),
        (["benchmark.sets={test: {source: []}}"], "at least 1 item"),
        (["benchmark.sets={test: {source: [digits, digits]}}"], "a source stands there twice"),
        (["benchmark.sets={test: {source: digits}, ood: {source: digits}}"], "ood/GROUP/NAME"),
        (["benchmark.class_names=[one, One]"], "the classes 'one' and 'One' have one name"),
        (["benchmark.class_names=[red_dog, 'red  Dog']"], "have one name but for case"),
        (['benchmark.class_names=[one, "t\\x1bwo"]'], "class name 't\\x1bwo'"),
        (['benchmark.name="a\\nb"'], "cannot be printed"),
        (['benchmark.notes="a\\x1b[2J"'], "cannot be printed"),
    ],
)
def test_they_are_refused_in_validation(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(PipelineConfig, "pipeline", words)
    assert said in printable(str(caught.value))


@pytest.mark.parametrize("name", ["../../x", "a/b", '"a\\nb"'])
def test_a_methods_name_from_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: {name}\n")
    data = load(PipelineConfig, "pipeline").model_dump()
    (method,) = list(data["methods"].values())[:1]
    data["methods"] = {name: method}
    with pytest.raises(ValueError, match=r"method .*: a name is a letter or digit"):
        PipelineConfig.model_validate(data)


def test_classes_that_a_reader_can_tell_apart() -> None:
    refuse_similar(["one", "two", "one two"])
    for names in (
        ["one", "one"],
        ["one", "ONE"],
        ["a b", "a_b"],
        ["Straße", "STRASSE"],
        ["a", " "],
    ):
        with pytest.raises(ValueError, match=r"twice|one name|empty"):
            refuse_similar(names)


@pytest.mark.parametrize(
    ("uri", "said"),
    [("s3://bucket/x", "uv pip install s3fs=="), ("nowhere://x", "a URI that fsspec knows")],
)
def test_a_storage_without_its_client(uri: str, said: str) -> None:
    with pytest.raises(UserError, match=r"^storage=") as caught:
        Storage.open(uri)
    assert said in str(caught.value)


def test_nothing_moves_the_cursor() -> None:
    assert printable("plain é 漢 text") == "plain é 漢 text"
    assert printable("a\nb\x1b[31m\x00\u202e\udcff\x9b") == "a\\nb\\x1b[31m\\x00\\u202e\\udcff\\x9b"


def test_an_error_is_a_line_whatever_its_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "a\nerror: forged\x1b[2J.csv"
    table.write_text("nothing\n")
    from pipelines.data.sources import FolderSource

    def action(_: object) -> None:
        FolderSource(root=str(tmp_path), table=str(table)).index()

    monkeypatch.setattr(sys, "argv", ["jobs.pipeline"])
    with pytest.raises(SystemExit) as stopped:
        main("pipeline", run_section, action, pipeline.__doc__)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()
    assert "a\\nerror: forged\\x1b[2J.csv: no column 'key'" in said
