"""What `--help` prints: what users set most on one screen; with the word `all` every key."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pipelines.config import CONF, Section, chosen, group_names, load, plain

# Jobs that are a part of a run, whose sections have more keys than a screen has lines.
RUN_JOBS = ("pipeline", "train", "embed", "sweep", "finetune", "score", "evaluate", "register")
# What users set most, in the order of a run; a group's names are added to its meaning.
MOST_SET = {
    "benchmark": "its images",
    "benchmark.root": "folder in which a public benchmark's archives were unpacked",
    "backbone": "the network",
    "backbone.path": "file with its weights",
    "methods": "compared, [NAME, ...] or all",
    "methods.NAME.training.epochs": "a setting of one method; --help all lists them",
    "scores": "what judges every head, [NAME, A+B, ...] or all",
    "sweep": "settings to search on validation data",
    "shots": "training images a class; null: all",
    "imbalance": "long tail: the last class's share of the first's images",
    "seeds": "number of repetitions",
    "target_tpr": "share of ID images that the threshold accepts",
    "compute": "this machine, or a Ray cluster",
    "storage": "folder or URI of everything that is kept",
    "tracking_uri": "MLflow server; default: SQLite in the storage folder",
    "verbose": "print every table in place of one screen",
    "preset": "words from a file",
    "allow_env": "true: files of your own may read ${oc.env:NAME}",
}
GROUPS = {"methods": "method"}
WIDTH = 98


def text(job: str, section: Callable[[], type[Section]], words: Sequence[str], about: str) -> str:
    """The help of a job.

    Args:
        job: its name.
        section: gives the section of its configuration.
        words: the rest of the command line; `all` asks for every key.
        about: the job's docstring.

    Raises:
        ConfigError: where the words are wrong.
    """
    rest = [word for word in words if word != "all"]
    command = job.removesuffix("_folder")  # of jobs.embed, with a source
    lines = [about.strip(), "", f"usage: python -m jobs.{command} [key=value ...]", ""]
    if job in RUN_JOBS and rest == list(words):
        lines += _most_set(job, rest)
    else:
        lines += _every_key(load(section(), job, rest))
    lines += ["KEY=@FILE takes a group, and preset=@FILE words, from a file of your own."]
    return "\n".join(lines)


def _most_set(job: str, words: Sequence[str]) -> Iterator[str]:
    """What users set most, with the values of `conf/` and of the words."""
    values = chosen(job, words)
    for key, meaning in MOST_SET.items():
        names = _names(GROUPS.get(key, key))
        label = f"{key}={_shown(values[key])}" if key in values else f"{key}="
        told = f"{meaning}: {', '.join(names)}" if names else meaning
        first, *others = textwrap.wrap(told, WIDTH - 36)
        if len(label) > 33:
            yield f"  {label}"
            label = ""
        yield f"  {label:<33} {first}"
        yield from (f"  {'':<33} {line}" for line in others)
    yield ""
    yield f"every key, type and meaning: python -m jobs.{job} --help all. NAME*: several in conf/."


def _names(group: str) -> list[str]:
    """The names that a group's files, or the presets, offer."""
    if group == "preset":
        jobs = {"embed_folder", "predict", "move", "figures", "benchmark", *RUN_JOBS}
        return _folded(sorted({path.stem for path in CONF.glob("*.yaml")} - jobs))
    names = group_names(group) if (CONF / group).is_dir() else []
    return names if group == "backbone" else _folded(names)


def _folded(names: Sequence[str]) -> list[str]:
    """The names, with families (NAME and NAME_..., or three of a first word) as one: NAME*."""
    first = Counter(name.partition("_")[0] for name in names)
    families = {name for name in names if any(n.startswith(f"{name}_") for n in names)}
    families |= {f"{word}_" for word, count in first.items() if count > 2 and word not in families}

    def shown(name: str) -> str:
        within = [f for f in families if name == f or name.startswith(f"{f.rstrip('_')}_")]
        return f"{min(within, key=len)}*" if within else name

    return list(dict.fromkeys(map(shown, names)))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _every_key(config: Section) -> Iterator[str]:
    for key, type_name, value, meaning in leaves(config):
        yield f"  {key}={json.dumps(value, default=plain)}  [{type_name}]"
        if meaning:
            yield f"      {meaning}"
    groups = ", ".join(path.name for path in sorted(CONF.iterdir()) if path.is_dir())
    yield ""
    yield f"groups (conf/GROUP/NAME.yaml): {groups}."


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, value, meaning) of every value in `section`, in order."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        key = f"{prefix}{name}"
        if isinstance(value, Section):
            yield from leaves(value, f"{key}.")
        elif isinstance(value, Mapping) and any(isinstance(v, Section) for v in value.values()):
            for inner, part in value.items():
                yield from leaves(part, f"{key}.{inner}.")
        else:
            kind = "which kind of section this is" if get_origin(info.annotation) is Literal else ""
            yield key, _type_name(info.annotation), value, info.description or kind


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    names = [_type_name(argument) for argument in arguments]
    if origin in (Union, UnionType):
        return " | ".join(names)
    own = "None" if annotation is NoneType else getattr(origin or annotation, "__name__", "value")
    return f"{own}[{', '.join(names)}]" if names else own
