"""Words and YAML groups in, one frozen, validated record out.

A job's configuration is `conf/<job>.yaml`, its groups (`conf/<group>/<name>.yaml`, chosen by
`group=name` or, from anywhere, `group=@FILE`) and the words of the command line, where a dotted
key sets one value (`benchmark.root=DIR`). `preset=name` takes words from `conf/<name>.yaml`, which
the command line's own words then override. Pydantic validates into sections that live beside the
code they configure. Every problem is reported at once, a line each, without a traceback.

A file of your own (`@FILE`) is read with care: `config.yaml_text` says what YAML is taken,
`config.interpolation` what it may refer to, and the environment is closed to it unless the command
line has `allow_env=true`. No address may hold credentials (`config.secrets`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.config.interpolation import fill_in, text_problem, texts_of
from pipelines.config.secrets import credentials_in, mask, mask_tree
from pipelines.config.yaml_text import YamlProblem, read_yaml, read_yaml_file, unusual_numbers

CONF = Path(__file__).resolve().parents[2] / "conf"
# Words for what users set most, in place of the dotted key.
SHORT = {name: f"embed.{name}" for name in ("max_rejected", "background", "exif")}

# No section lies deeper, and nothing that is shown is longer.
MAX_PARTS, MAX_SHOWN, MAX_PROBLEMS = 12, 400, 50

# A configuration before it is validated: plain data of any depth.
Tree = dict[str, Any]


class UserError(Exception):
    """A mistake of the user's: shown as its message, without a traceback, exit status 2."""


class ConfigError(UserError):
    """One or more problems of a configuration, each a line of its own."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Join `problems`, which stay readable one by one: printable, short, without secrets."""
        self.problems = [_readable(problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            self.problems.append(f"and {len(problems) - MAX_PROBLEMS:,} more problems")
        super().__init__("\n".join(self.problems))


def _readable(problem: str) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in mask(problem))
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


SectionT = TypeVar("SectionT", bound=Section)


def load(model: type[SectionT], job: str, words: Sequence[str] = ()) -> SectionT:
    """The configuration of `job` with the command line's `words` laid over it.

    Args:
        model: the section that validates it.
        job: the name of a file in `conf/`.
        words: `key=value` words; keys may be dotted, values are YAML.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    data, problems = compose(job, words)
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        # A group that could not be read lacks its keys; that was said already.
        unread = {problem.partition("=")[0] for problem in problems}
        problems += [
            _problem(e, data, model)
            for e in error.errors(include_url=False)
            if e["type"] not in ("missing", "union_tag_not_found") or e["loc"][0] not in unread
        ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def compose(job: str, words: Sequence[str]) -> tuple[Tree, list[str]]:
    """The plain data of `job` after groups and `words`, and the problems met on the way."""
    composer = _Composer()
    data, preset, given = composer.collect(job, words)
    composer.expand_groups(data)
    for key, value in (composer.fitting(preset, data) | given).items():
        if "." in key:
            composer.override(data, key, value)
    composer.expand_own_backbones(data.get("methods"))
    return composer.finish(data), composer.problems


def chosen(job: str, words: Sequence[str]) -> Tree:
    """What `job` and `words` say of each key, with groups by their names.

    Raises:
        ConfigError: where a word or a file cannot be read.
    """
    composer = _Composer()
    data, preset, given = composer.collect(job, words)
    found = data | preset | given
    if problems := [*composer.problems, *credentials_in(found)]:
        raise ConfigError(problems)
    return found


@dataclass
class _Composer:
    """Collects problems while words, files and groups become one tree."""

    problems: list[str] = field(default_factory=list)
    allow_env: bool = False

    def collect(self, job: str, words: Sequence[str]) -> tuple[Tree, Tree, Tree]:
        """The job's plain keys under all words, then the preset's words and the user's."""
        data = self.read(CONF / f"{job}.yaml")
        if base := data.pop("extends", None):
            data = {**self.read(CONF / f"{base}.yaml"), **data}
        given = self.parse(words)
        allow_env = given.pop("allow_env", False)
        if not isinstance(allow_env, bool):
            self.problems.append(f"allow_env={allow_env!r}: input should be true or false")
        self.allow_env = allow_env is True
        name = given.pop("preset", None)
        preset = {} if name is None else self.file(str(name), CONF, "preset")
        data |= {key: value for key, value in (preset | given).items() if "." not in key}
        return data, preset, given

    def read(self, path: Path, label: str = "", *, foreign: bool = False) -> Tree:
        """The mapping in a YAML file; `label` names it in messages in place of its path."""
        label = label or str(path)
        try:
            content = read_yaml_file(path)
        except FileNotFoundError:
            self.problems.append(f"{label}: no such file")
        except (YamlProblem, OSError, ValueError) as error:
            self.problems.append(f"{label}: not readable as YAML ({error})")
        else:
            if isinstance(content, dict | None):
                return self.allowed(content or {}, label, foreign=foreign)
            self.problems.append(f"{label}: expected a mapping of keys to values")
        return {}

    def allowed(self, content: dict[Any, Any], label: str, *, foreign: bool) -> Tree:
        """The keys of a file, whose texts may refer to what is open to it."""
        given = {str(key): value for key, value in content.items()}
        closed = foreign and not self.allow_env
        wrong = [
            f"{label}: {key}: {problem}"
            for key, text in texts_of(given)
            if "${" in text and (problem := text_problem(text, env=not closed))
        ]
        self.problems += wrong
        return {} if wrong else given

    def file(self, name: str, folder: Path, word: str) -> Tree:
        """The content of `folder`/`name`.yaml, or of FILE where the name is `@FILE`."""
        if name.startswith("@"):
            return self.read(_path(name[1:]), f"{word}={name}", foreign=True)
        return self.read(folder / f"{name}.yaml", f"{word}={name}")

    def group(self, group: str, name: str, word: str = "") -> Tree:
        """The content of a group's file, which the user chose by `word` (the group's name)."""
        if name.startswith("@") or name in (known := group_names(group)):
            return self.file(name, CONF / group, word or group)
        self.problems.append(f"{word or group}={name}: no such {group}; {_choices(name, known)}")
        return {}

    def parse(self, words: Sequence[str]) -> Tree:
        """Values by the keys of `words`; the last one wins."""
        given: Tree = {}
        for word in words:
            key, equals, text = word.partition("=")
            if not equals or not key or ".." in f".{key}." or key.count(".") > MAX_PARTS:
                self.problems.append(f"{_cut(word)!r}: expected key=value, for example seeds=3")
                continue
            try:
                value = text if text.startswith("@") else read_yaml(text)  # @: reserved in YAML
            except YamlProblem as problem:
                told = f"the value is not readable as YAML ({problem})"
                self.problems.append(f"{_cut(word)!r}: {told}")
                continue
            wrong = [w for _, t in texts_of(value) if (w := text_problem(t, env=True))]
            self.problems += [f"{_cut(word)!r}: {problem}" for problem in wrong]
            if not wrong:
                given[SHORT.get(key, key)] = value
        return given

    @staticmethod
    def fitting(preset: Tree, data: Tree) -> Tree:
        """A preset without the dotted keys of methods that are not chosen."""
        methods = data.get("methods")
        chosen = methods if isinstance(methods, dict) else {}
        return {
            key: value
            for key, value in preset.items()
            if not key.startswith("methods.") or key.split(".")[1] in chosen
        }

    def expand_groups(self, data: Tree) -> None:
        """Replace the names of groups, and of methods, by the content of their files."""
        for key, value in data.items():
            if key == "methods":
                data[key] = self.expand_methods(value)
            # conf/negative_classes/ holds lists of words, which are no group.
            elif (CONF / key).is_dir() and group_names(key) and isinstance(value, str):
                data[key] = self.group(key, value)

    def expand_methods(self, value: Any) -> Any:
        """Methods by name; the one of `@FILE` is called what its file says.

        `all` leaves out those whose file says `in_all: false`: not every backbone can take them.
        """
        names = group_names("method") if value == "all" else value
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list):
            return value
        read = {str(name): self.group("method", str(name), "methods") for name in names}
        wanted = {name: method.pop("in_all", True) for name, method in read.items()}
        if value == "all":
            read = {name: method for name, method in read.items() if wanted[name]}
        own = {
            name: m.get("name", name) if name.startswith("@") else name for name, m in read.items()
        }
        self.expand_own_backbones(read)
        return {str(own[name]): method for name, method in read.items()}

    def expand_own_backbones(self, methods: Any) -> None:
        """Replace the name of the backbone that a method trains by the content of its file."""
        for name, method in methods.items() if isinstance(methods, dict) else ():
            head = method.get("head") if isinstance(method, dict) else None
            train = head.get("train") if isinstance(head, dict) else None
            if isinstance(train, dict) and isinstance(chosen := train.get("backbone"), str):
                word = f"methods.{name}.head.train.backbone"
                train["backbone"] = self.group("backbone", chosen, word)

    def override(self, data: Tree, key: str, value: Any) -> None:
        """Set the value of a dotted key, making the mappings on the way."""
        *parents, last = key.split(".")
        if len(parents) > MAX_PARTS:
            self.problems.append(f"{key}: no key has so many parts")
            return
        node: Any = data
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[last] = value
        else:
            self.problems.append(f"{key}: {'.'.join(parents)} holds no keys")

    def finish(self, data: Tree) -> Tree:
        """Fill in `${other.key}` once all words are laid over the files; check every value."""
        filled, problems = fill_in(data)
        self.problems += [*problems, *unusual_numbers(filled), *credentials_in(filled)]
        return filled


def _path(name: str) -> Path:
    """A path as a user writes it; `~` stays where nobody knows whose home it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _cut(word: str) -> str:
    word = mask(word)  # before a cut hides where an address began
    return word if len(word) <= 120 else f"{word[:60]}...{word[-57:]}"


def group_names(group: str) -> list[str]:
    """The names that `conf/<group>/` offers, sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _choices(came: str, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    close = difflib.get_close_matches(came, names, n=1)
    return f"allowed: {', '.join(names)}" + (f" (did you mean {close[0]}?)" if close else "")


def _problem(error: Any, data: Any, model: type[Section]) -> str:
    """One line for one pydantic error: the key, what came, what is allowed."""
    keys: list[str] = []
    node = data
    for position, part in enumerate(error["loc"]):
        inside_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if inside_list or (isinstance(node, dict) and part in node):
            node = node[part]
        elif position < len(error["loc"]) - 1 or error["type"] == "value_error":
            continue  # the tag of a union, which is no key of the user's
        keys.append(str(part))
    if error["type"] == "extra_forbidden":
        return f"{'.'.join(keys)}: unknown key; {_choices(keys[-1], _allowed(model, error['loc']))}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    came = error["input"]
    if error["type"] == "missing" or isinstance(came, dict | BaseModel):
        return f"{'.'.join(keys) or 'configuration'}: {message}"
    return f"{'.'.join(keys)}={came!r}: {message}"


def _allowed(model: type[Section], loc: Sequence[str | int]) -> set[str]:
    """The keys of the section in which pydantic met the unknown key at `loc`."""
    here = known = [model]
    for part in loc[:-1]:
        fields = [section.model_fields[part] for section in here if part in section.model_fields]
        if fields:
            here = known = [s for info in fields for s in _sections(info.annotation)]
        else:  # a key of a mapping, or the default that tells the sections of a union apart
            tagged = [s for s in known if any(part == i.default for i in s.model_fields.values())]
            here = tagged or known
    return {name for section in here for name in section.model_fields}


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Every section that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def plain(section: Section) -> Tree:
    """The section as plain data, ready for YAML or JSON."""
    return section.model_dump(mode="json")


def digest(content: Any, *, length: int = 16) -> str:
    """A content address: the first hex digits of the SHA-256 of canonical JSON."""
    if isinstance(content, Section):
        content = plain(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def to_yaml(content: Section | Mapping[str, Any]) -> str:
    """YAML of a section or of plain data, to be kept and shown: without credentials."""
    data = plain(content) if isinstance(content, Section) else dict(content)
    return OmegaConf.to_yaml(OmegaConf.create(mask_tree(data)))
