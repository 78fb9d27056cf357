"""Files that somebody else wrote: what they may not read, and what they cannot break."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy_config import BOMB, conf_folder, problems, read  # noqa: F401 - the fixture conf


@pytest.mark.usefixtures("conf")
class TestFilesOfOnesOwn:
    """A file that somebody else wrote reads neither the environment nor anything by a resolver."""

    @pytest.fixture(autouse=True)
    def _planted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PLANTED", "geheim-5f3a")

    WORDS = ("engine=@{}", "preset=@{}", "methods=@{}")

    @pytest.mark.parametrize("word", WORDS)
    @pytest.mark.parametrize(
        "text",
        [
            "${oc.env:PLANTED}",
            "a/${oc.env:PLANTED,x}/b",
            "${oc.decode:${oc.env:PLANTED}}",
            "${oc.${engine.part}:PLANTED}",
            "${${engine.part}}",
            "${oc.create:[1]}",
            "${oc.select:color}",
            "${oc.dict.keys:engine}",
            "\\\\${oc.env:PLANTED}",
        ],
    )
    def test_no_environment_and_no_resolver(self, word: str, text: str, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text(f'address: "{text}"\npart: "oc.env:PLANTED"\n')
        found = problems(word.format(file))
        assert found[0].startswith(f"{word.format(file)}: address: ")
        assert "geheim" not in "".join(found)

    def test_a_word_allows_the_environment(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text("address: ${oc.env:PLANTED}\n")
        assert read(f"engine=@{file}", "allow_env=true").engine.address == "geheim-5f3a"
        (problem,) = problems(f"engine=@{file}", "allow_env=false")
        assert "allow_env=true" in problem
        assert problems("allow_env=1") == ["allow_env=1: input should be true or false"]

    def test_a_file_does_not_allow_it_itself(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text("allow_env: true\nfolder: ${oc.env:PLANTED}\n")
        assert "allow_env=true on the command line" in "".join(problems(f"preset=@{file}"))
        file.write_text("allow_env: true\n")
        (problem,) = problems(f"preset=@{file}")
        assert problem.startswith("allow_env: unknown key")

    def test_a_key_is_still_referred_to(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text("address: at ${color}\n")
        assert read(f"engine=@{file}").engine.address == "at red"

    def test_the_projects_own_files_and_words_read_it(self, conf: Path) -> None:
        (conf / "engine" / "named.yaml").write_text("address: ${oc.env:PLANTED}\n")
        assert read("engine=named").engine.address == "geheim-5f3a"
        assert read("folder=${oc.env:NO_SUCH_ONE, ../x}").folder == "../x"
        assert problems("folder=${oc.env:NO_SUCH_ONE}") == [
            "folder: environment variable NO_SUCH_ONE is not set"
        ]


@pytest.mark.usefixtures("conf")
class TestTextsThatBreakReaders:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a: " + "[" * 3000, "nested more than 30 deep"),
            ("\n".join(" " * n + "a:" for n in range(3000)), "nested more than 30 deep"),
            (f"workers: {'9' * 5000}", "an integer of too many digits"),
            (f"workers: 0x{'f' * 5000}", "an integer of too many digits"),
            ("a: 1\nb: 2\na: 3", "the key 'a' stands there twice (line 3)"),
            ("a: {b: {1: x, '1': y}}", "the key '1' stands there twice"),
            ("a: &a [*a]", "*a stands inside of what it stands for"),
            (BOMB, "more than 500,000 values, aliases expanded"),
            ('address: "\\0"', "a text with a NUL"),
            ("address: !!binary aGk=", "a bytes where a text or a number is expected"),
            ("workers: !!int", "a value that its tag does not fit"),
            (b"address: \xc3\x28", "no UTF-8 text: byte 0xc3 at 9"),
            (b"\x89PNG\r\n\x1a\n\0", "no UTF-8 text: byte 0x89 at 0"),
        ],
    )
    def test_a_file_that_would_break_a_reader(
        self, tmp_path: Path, content: str | bytes, message: str
    ) -> None:
        file = tmp_path / "bad.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        (problem,) = problems(f"engine=@{file}")
        assert problem.startswith(f"engine=@{file}: not readable as YAML ({message}")

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            (f"sizes={'[' * 3000}", "nested more than 30 deep"),
            (f"engine.workers={'9' * 5000}", "an integer of too many digits"),
            ("engine.workers={a: 1, a: 2}", "the key 'a' stands there twice"),
            ("folder=\udcff", "no UTF-8 text"),
        ],
    )
    def test_a_word_that_would_break_a_reader(self, word: str, message: str) -> None:
        (problem,) = problems(word)
        assert message in problem
        assert len(problem) < 300

    def test_interpolation_grows_no_further_than_memory(self, tmp_path: Path) -> None:
        file = tmp_path / "bomb.yaml"
        ten = [f"a{n}: '" + f"${{engine.a{n - 1}}}" * 10 + "'" for n in range(1, 8)]
        text = "\n".join([f"a0: '{'x' * 100_000}'", *ten])
        file.write_text(text)
        found = problems(f"engine=@{file}")
        assert any("makes more than 2,000,000 values and characters" in line for line in found)

    def test_a_long_chain_and_a_circle(self) -> None:
        words = [f"engine.k{n}=${{engine.k{n + 1}}}" for n in range(20)]
        assert any("more than 8 keys" in line for line in problems(*words))
        found = problems("folder=${color}", "color=${folder}")
        assert any("it stands for itself, by way of others" in line for line in found)

    def test_what_is_told_is_printable(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text('"\\e[31m\\n": 1\n')
        found = problems(f"engine=@{file}", "\x1b[2J=1", "\n")
        assert all(line.isprintable() for line in found)
