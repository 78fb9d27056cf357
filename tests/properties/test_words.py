"""Any words and any YAML text: a configuration, or problems in printable lines; in time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipelines.config import ConfigError, load, plain, to_yaml
from pipelines.settings.config import PipelineConfig
from tests.properties.profiles import both


def loads_or_says_why(words: list[str]) -> None:
    """What every command does first."""
    try:
        found = load(PipelineConfig, "pipeline", words)
    except ConfigError as error:
        problems, whole = error.problems, str(error)
    else:
        assert to_yaml(found)
        assert plain(found)
        return
    assert problems
    assert whole.splitlines() == problems
    assert all(line.isprintable() and 0 < len(line) < 600 for line in problems)


def file_loads_or_says_why(content: str | bytes) -> None:
    """The text as a file in each place that takes one."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.yaml"
        path.write_bytes(content)
        for key in ("benchmark", "preset", "methods", "sweep"):
            loads_or_says_why([f"{key}=@{path}"])


def laughs(line: str, levels: int = 12) -> str:
    """A few lines that stand for 10**levels values; each says the one before ten times."""
    first, *others = line.split("|")
    return "\n".join(
        [
            first,
            *(others[0].replace("<", str(n - 1)).replace(">", str(n)) for n in range(1, levels)),
        ]
    )


def ten(text: str) -> str:
    return ", ".join([text] * 10)


KINDS: list[str | bytes] = [
    "a: " + "[" * 3000,
    "[" * 3000 + "]" * 3000,
    "{a: " * 3000 + "1" + "}" * 3000,
    "\n".join(" " * n + "a:" for n in range(3000)),
    f"seeds: {'9' * 5000}",
    f"seeds: 0x{'f' * 5000}",
    f"seeds: -{'9' * 40}",
    f"seeds: {'1:' * 3000}1",
    f"target_tpr: 1e{'9' * 400}",
    laughs(f"a0: &a0 [ha]|a>: &a> [{ten('*a<')}]"),
    laughs(f"a0: &a0 {{ha: 1}}|a>: &a> {{'<' : [{ten('*a<')}]}}"),
    laughs(f"a0: &a0 {{ha: 1}}|a>: &a> {{MERGE: [{ten('*a<')}]}}").replace("MERGE", "<<"),
    laughs(f"a0: ha|a>: '{ten('${a<}')}'"),
    laughs(f"a0: [ha]|a>: [{ten('${a<}')}]"),
    "\n".join(f"a{n}: ${{a{n + 1}}}" for n in range(3000)),
    "a: &a [*a]",
    "a: &a {b: *a}",
    "a: *nobody",
    "a: ${b}\nb: ${a}",
    "a: ${a}",
    "a: 1\na: 2",
    "1: a\n'1': b",
    "a: .nan\nb: .inf",
    "a: !!python/object/apply:os.system [id]",
    "a: !!python/object/apply:pathlib.PosixPath [x]",
    "a: !!binary aGk=",
    "a: !!timestamp 2020-01-01",
    "a: !!timestamp 2020-99-99",
    "a: !!set {b, c}",
    "a: !!int x",
    "a: !!bool x",
    "a: !!float {}",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "null: c",
    "a: ${oc.env:HOME}",
    "a: ${oc.${b}:HOME}\nb: env",
    "a: ${${b}}\nb: 'oc.env:HOME'",
    "a: ${oc.decode:x}",
    "a: ${oc.create:[1]}",
    "a: ${",
    "a: '\\${x}'",
    'a: "\\0"',
    'a: "\\e[31m"',
    '"\\e[31m\\n": 1',
    'a: "\\ud800"',
    "---\na: 1\n---\nb: 2",
    "%YAML 9.9\n---\na",
    "\t- a",
    "a: 'b",
    "a: ???",
    "allow_env: true",
    "methods: {zero_shot: ${methods}}",
    "extends: pipeline",
    "preset: test",
    "sets: {train: {source: [a]}}",
    "name: x\nclass_names: [a, b]\nsources: {s: {kind: folder, root: 'http://u:p@h'}}\nsets: {}",
    b"\xff\xfea\x00:\x00 \x001\x00",
    b"\xef\xbb\xbfname: x",
    b"PAR1\x00\x00\x15\x04\x15",
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    b"a: \xc3\x28",
    b"\x00" * 1000,
    b"",
    b"42",
    b"- a",
]
WORDS: list[list[str]] = [
    [f"seeds={'9' * 5000}"],
    [f"scores={'[' * 3000}"],
    [f"methods.coop={'{a: ' * 3000}"],
    [f"{'a.' * 3000}b=1"],
    ["seeds"],
    ["=1"],
    ["seeds=!!int"],
    ["a..b=1"],
    ["\x1b[31m=1"],
    ["a\nb=1"],
    ["storage=a\x00b"],
    ["storage='\\0'"],
    ['storage="\\0"'],
    ["storage=\udcff"],
    ["\udcff=1"],
    ["benchmark=@/"],
    ["benchmark=@/dev/zero"],
    ["benchmark=@/nowhere"],
    ["benchmark=@"],
    ["benchmark=@~nobody-here/x"],
    [f"benchmark=@{'x' * 5000}"],
    ["benchmark=../conf/benchmark/digits"],
    ["preset=../pipeline"],
    ["preset=[1]"],
    ["preset=null"],
    ["preset=" + "x" * 5000],
    ["preset=/etc/passwd"],
    ["methods=[[coop]]"],
    ["methods=[{}]"],
    ["methods={1: {}}"],
    ["methods.coop.training.lr=.nan"],
    ["target_tpr=.inf"],
    ["target_tpr=1e999"],
    ["seeds=${seeds}"],
    ["storage=${oc.env:NO_SUCH_VARIABLE}"],
    ["storage=${oc.env:HOME}"],
    ["storage=${methods}"],
    ["storage=${methods}/x"],
    ["allow_env=maybe"],
    ["tracking_uri=http://u:p@h"],
    ["benchmark=null"],
    ["benchmark=3"],
    ["backbone=[]"],
    ["compute={}"],
    ["embed=1"],
    ["sweep.space={coop: {training.lr: [.nan]}}"],
    ["benchmark.sets={}"],
    ["benchmark.sets.x=1"],
    ["benchmark.sources.digits=[]"],
]
KEYS = st.sampled_from(
    ["seeds", "methods", "scores", "benchmark", "backbone", "sweep", "preset", "storage", "x.y"]
)
SIGNS = [": ", "- ", "&a ", "*a", "<<: ", "!!int ", "\n", "  ", "\t", "${", "null", ".nan", "1e9"]
PIECES = st.sampled_from([*SIGNS, *":[]{},|>'\"}@~#%\\0"])
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=25).map("".join))
ANY_WORDS = st.lists(
    st.one_of(st.text(max_size=30), st.builds(lambda k, v: f"{k}={v}", KEYS, TEXTS)), max_size=4
)
ANY_FILES: st.SearchStrategy[Any] = st.one_of(
    TEXTS,
    st.binary(max_size=200),
    st.lists(st.builds(lambda k, v: f"{k}: {v}", KEYS, TEXTS), max_size=5).map("\n".join),
)

test_words, test_words_long = both(loads_or_says_why, ANY_WORDS, WORDS)
test_files, test_files_long = both(file_loads_or_says_why, ANY_FILES, KINDS, short=40)


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        load(PipelineConfig, "pipeline", [f"benchmark=@{tmp_path / 'pipe'}"])
