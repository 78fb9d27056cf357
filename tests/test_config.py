"""Words over YAML groups into frozen sections; every problem on a line of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines import config
from pipelines.config import UserError, digest, plain, to_yaml
from tests.toy_config import (
    Engine,
    Heavy,
    Plain,
    conf_folder,  # noqa: F401 - the fixture conf
    problems,
    read,
)


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
