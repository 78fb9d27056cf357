"""Words over YAML groups into frozen sections; every problem on a line of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from pipelines import config
from pipelines.config import (
    ConfigError,
    Section,
    UserError,
    digest,
    load,
    plain,
    to_yaml,
)


class Plain(Section):
    name: Literal["plain"] = "plain"
    epochs: int = Field(3, ge=1, description="passes")


class Heavy(Section):
    name: Literal["heavy"] = "heavy"
    weight: float = Field(1.0, ge=0, description="of the loss")
    epochs: int = Field(5, ge=1, description="passes")


class Engine(Section):
    address: str = Field("local", description="where")
    workers: int = Field(1, ge=1, description="how many")


class Toy(Section):
    methods: dict[str, Annotated[Plain | Heavy, Field(discriminator="name")]]
    engine: Engine = Engine()
    color: Literal["red", "green"] = Field("red", description="of the toy")
    share: float = Field(0.5, gt=0, le=1, description="a part")
    folder: str = Field(".", description="a place")
    sizes: list[int] = Field([], description="in order")


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small conf/ of its own."""
    files = {
        "toy.yaml": "methods: [plain, heavy]\nengine: here\ncolor: red\nfolder: ${color}/x\n",
        "child.yaml": "extends: toy\nshare: 0.25\n",
        "engine/here.yaml": "address: here\n",
        "engine/there.yaml": "address: there\nworkers: 4\n",
        "method/plain.yaml": "name: plain\n",
        "method/heavy.yaml": "name: heavy\nweight: 2.0\n",
    }
    for name, content in files.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    return tmp_path / "conf"


# A few lines that stand for 10**12 values.
BOMB = "\n".join(
    ["a0: &a0 [ha]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)


def read(*words: str, job: str = "toy") -> Toy:
    return load(Toy, job, words)


def problems(*words: str, job: str = "toy") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(*words, job=job)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


@pytest.mark.usefixtures("conf")
class TestComposition:
    def test_defaults_of_the_file_its_groups_and_the_sections(self) -> None:
        found = read()
        assert found.engine == Engine(address="here", workers=1)
        assert found.methods == {"plain": Plain(epochs=3), "heavy": Heavy(weight=2.0, epochs=5)}
        assert found.share == 0.5

    @pytest.mark.parametrize(
        ("word", "value"),
        [
            ("share=0.75", 0.75),
            ("color=green", "green"),
            ("sizes=[1, 2]", [1, 2]),
            ("folder=/a=b", "/a=b"),
            ("folder=s3://bucket/x", "s3://bucket/x"),
        ],
    )
    def test_a_word_sets_a_value(self, word: str, value: object) -> None:
        assert getattr(read(word), word.partition("=")[0]) == value

    def test_a_word_chooses_a_group(self) -> None:
        assert read("engine=there").engine == Engine(address="there", workers=4)

    def test_dotted_keys_lie_over_the_group_wherever_they_stand(self) -> None:
        assert read("engine.workers=9", "engine=there").engine == Engine(address="there", workers=9)

    def test_the_last_word_wins(self) -> None:
        assert read("share=0.75", "share=0.125").share == 0.125

    def test_a_dotted_key_below_a_section_left_to_its_defaults(self, conf: Path) -> None:
        (conf / "toy.yaml").write_text("methods: [plain]\n")
        assert read("engine.workers=2").engine == Engine(address="local", workers=2)

    def test_a_group_from_a_file(self, tmp_path: Path) -> None:
        own = tmp_path / "own.yaml"
        own.write_text("address: elsewhere\n")
        assert read(f"engine=@{own}").engine == Engine(address="elsewhere", workers=1)

    def test_interpolation_sees_the_words(self) -> None:
        assert read().folder == "red/x"
        assert read("color=green").folder == "green/x"
        assert read("engine=there", "folder=${engine.address}").folder == "there"

    def test_interpolation_in_a_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOY_ROOT", "/toys")
        assert read("folder=${oc.env:TOY_ROOT}/${color}").folder == "/toys/red"

    def test_extends_takes_another_jobs_words(self) -> None:
        found = read(job="child")
        assert found.share == 0.25
        assert found.engine.address == "here"


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
class TestPresets:
    @pytest.fixture(autouse=True)
    def _file(self, conf: Path) -> None:
        (conf / "small.yaml").write_text(
            "engine: there\nshare: 0.125\nengine.workers: 2\nmethods.heavy.epochs: 1\n"
        )

    def test_its_words_lie_over_the_job(self) -> None:
        found = read("preset=small")
        assert found.engine == Engine(address="there", workers=2)
        assert found.share == 0.125
        assert found.methods["heavy"] == Heavy(weight=2.0, epochs=1)
        assert found.folder == "red/x"

    def test_the_command_line_lies_over_it_wherever_it_stands(self) -> None:
        found = read("share=0.75", "engine.workers=6", "preset=small")
        assert found.engine == Engine(address="there", workers=6)
        assert found.share == 0.75

    def test_parts_for_methods_that_are_not_chosen_fall_away(self) -> None:
        assert read("preset=small", "methods=[plain]").methods == {"plain": Plain()}

    def test_from_a_file(self, conf: Path) -> None:
        assert read(f"preset=@{conf / 'small.yaml'}") == read("preset=small")

    def test_one_that_is_not_there(self) -> None:
        assert problems("preset=tiny") == ["preset=tiny: no such file"]


@pytest.mark.usefixtures("conf")
class TestMethods:
    def test_a_name_alone_is_a_list_of_one(self) -> None:
        assert read("methods=[heavy]").methods == {"heavy": Heavy(weight=2.0)}
        assert read("methods=heavy") == read("methods=[heavy]")

    def test_methods_key_by_name(self) -> None:
        assert read("methods.plain.epochs=8").methods["plain"].epochs == 8

    def test_all_is_every_file_of_the_group(self, conf: Path) -> None:
        (conf / "method" / "third.yaml").write_text("name: plain\nepochs: 9\n")
        found = read("methods=all").methods
        assert list(found) == ["heavy", "plain", "third"]
        assert found["third"] == Plain(epochs=9)

    def test_a_method_from_a_file_is_called_by_its_name(self, tmp_path: Path) -> None:
        own = tmp_path / "own.yaml"
        own.write_text("name: heavy\nweight: 3\n")
        heavy = Heavy(weight=3.0, epochs=2)
        assert read(f"methods=@{own}", "methods.heavy.epochs=2").methods == {"heavy": heavy}
        both = read(f"methods=['@{own}', plain]", "methods.heavy.epochs=2").methods
        assert both == {"heavy": heavy, "plain": Plain()}

    def test_a_name_that_is_not_there(self) -> None:
        assert problems("methods=[heavi]") == [
            "methods=heavi: no such method; allowed: heavy, plain (did you mean heavy?)"
        ]

    def test_a_parameter_of_a_method_that_is_not_chosen(self) -> None:
        (problem,) = problems("methods=[plain]", "methods.heavy.weight=1")
        assert problem.startswith("methods.heavy")

    def test_the_singular_is_no_word(self) -> None:
        for word in ("method=plain", "method.weight=1"):
            (problem,) = problems(word)
            assert problem.startswith("method: unknown key; allowed: ")
            assert problem.endswith("(did you mean methods?)")


@pytest.mark.usefixtures("conf")
class TestProblems:
    def test_all_at_once_each_on_its_own_line(self) -> None:
        found = problems(
            "engine=hero",
            "method",
            "colour=green",
            "share=2",
            "sizes=many",
            "methods.heavy.wieght=3",
            "methods.plain.epochs=0",
            "folder=${nowhere}",
            "color=blue",
        )
        assert sorted(found) == sorted(
            [
                "engine=hero: no such engine; allowed: here, there (did you mean here?)",
                "'method': expected key=value, for example seeds=3",
                "colour: unknown key; allowed: color, engine, folder, methods, share, sizes "
                "(did you mean color?)",
                "share=2: input should be less than or equal to 1",
                "sizes='many': input should be a valid list",
                "methods.heavy.wieght: unknown key; allowed: epochs, name, weight "
                "(did you mean weight?)",
                "methods.plain.epochs=0: input should be greater than or equal to 1",
                "folder: Interpolation key 'nowhere' not found",
                "color='blue': input should be 'red' or 'green'",
            ]
        )

    @pytest.mark.parametrize("word", ["word", "=3", ".a=3", "a..b=3", "a.=3"])
    def test_no_key_and_value(self, word: str) -> None:
        assert problems(word) == [f"{word!r}: expected key=value, for example seeds=3"]

    @pytest.mark.parametrize("word", ["sizes=[1,", "folder={a: b"])
    def test_a_value_that_is_no_yaml(self, word: str) -> None:
        (problem,) = problems(word)
        assert problem.startswith(f"{word!r}: the value is not readable as YAML (")

    def test_an_interpolation_without_its_end(self) -> None:
        assert problems("folder=${x") == ["'folder=${x': ${ without its }, or one inside the other"]

    @pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
    def test_a_number_that_is_none(self, value: str) -> None:
        (problem,) = problems(f"methods.heavy.weight={value}")
        assert problem.startswith("methods.heavy.weight=")
        assert problem.endswith("input should be a finite number")

    def test_every_interpolation_that_fails(self) -> None:
        found = problems("folder=${nope}", "engine.address=${nor.this}")
        assert len(found) == 2
        assert found[0].startswith("engine.address: ")
        assert found[1].startswith("folder: ")

    def test_a_file_that_is_missing(self, tmp_path: Path) -> None:
        file = tmp_path / "nothing.yaml"
        assert problems(f"engine=@{file}") == [f"engine=@{file}: no such file"]
        assert problems(f"methods=@{file}") == [f"methods=@{file}: no such file"]
        assert "no such file" in problems(job="unheard")[0]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a: [1", "not readable as YAML"),
            (b"a: 1\na: 2", "not readable as YAML"),
            (b"\xff\xfe\x00", "not readable as YAML"),
            (b"- a\n- b", "expected a mapping"),
            (b"42", "expected a mapping"),
        ],
    )
    def test_a_file_that_is_no_mapping(self, tmp_path: Path, content: bytes, message: str) -> None:
        file = tmp_path / "bad.yaml"
        file.write_bytes(content)
        (problem,) = problems(f"engine=@{file}")
        assert problem.startswith(f"engine=@{file}: {message}")

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

    def test_a_folder_in_place_of_a_file(self, tmp_path: Path) -> None:
        (problem,) = problems(f"engine=@{tmp_path}")
        assert problem == f"engine=@{tmp_path}: not readable as YAML (a folder; give a file)"

    def test_a_key_below_a_value(self) -> None:
        assert problems("engine.address.a=1") == ["engine.address.a: engine.address holds no keys"]

    def test_an_unknown_kind_names_the_known_ones(self) -> None:
        (problem,) = problems("methods.plain.name=light")
        assert problem.startswith("methods.plain")
        assert "'plain', 'heavy'" in problem

    def test_an_unknown_key_is_told_the_keys_of_its_own_section(self, conf: Path) -> None:
        # Called otherwise than the method is: the tag, not the key, tells which section it is.
        (conf / "method" / "plain2.yaml").write_text("name: heavy\n")
        (problem,) = problems("methods=[plain2]", "methods.plain2.epoch=1")
        assert problem.startswith(
            "methods.plain2.epoch: unknown key; allowed: epochs, name, weight"
        )
        (problem,) = problems("engine.adress=x")
        assert problem == (
            "engine.adress: unknown key; allowed: address, workers (did you mean address?)"
        )

    def test_it_is_a_users_error(self) -> None:
        with pytest.raises(UserError):
            read("share=0")


def test_sections_are_frozen_and_closed() -> None:
    engine = Engine()
    with pytest.raises(ValidationError, match="frozen"):
        engine.workers = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Engine(worker=3)  # type: ignore[call-arg]


def test_a_digest_depends_on_content_alone() -> None:
    assert digest({"b": 1, "a": [2.5]}) == digest({"a": [2.5], "b": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest(Engine()) == digest({"workers": 1, "address": "local"})
    # printf '{"a":1}' | sha256sum
    assert digest({"a": 1}) == "015abd7f5cc57a2d"


@pytest.mark.usefixtures("conf")
def test_a_resolved_configuration_reads_back_as_itself() -> None:
    found = read("engine=there", "share=0.75")
    (config.CONF / "again.yaml").write_text(to_yaml(found))
    assert read(job="again") == found
    assert json.loads(json.dumps(plain(found)))["engine"] == {"address": "there", "workers": 4}
