"""The resolved configuration of a run, and what of it is checked against the benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from pipelines.config import ConfigError, UserError
from pipelines.data.benchmarks import Benchmark, open_benchmark
from pipelines.evaluate.config import CompareConfig
from pipelines.finetune.data import columns_of
from pipelines.finetune.outlier_prior import OUTLIERS
from pipelines.heads import HEADS
from pipelines.heads.base import LOCAL
from pipelines.methods import AnyMethod, MethodConfig
from pipelines.records import check_name
from pipelines.score import by_name as scoring
from pipelines.score import search as posthoc
from pipelines.settings.words import RunWords

# Keys that say where and how to compute and what is shown, not what: they name no other run.
NOT_CONTENT = ("storage", "tracking_uri", "compute", "verbose")


class PipelineConfig(RunWords):
    """The resolved configuration of a run; every stage takes the same words."""

    methods: dict[str, AnyMethod] = Field(min_length=1, description="what is compared")
    scores: list[str] = Field(
        min_length=1,
        description="what judges every head: names, sums A+B; all: every score of similarities, "
        "neg_label, and gl_mcm where a method reads local features",
    )

    @field_validator("scores", mode="before")
    @classmethod
    def _all_scores(cls, value: Any, info: ValidationInfo) -> Any:
        if value != "all":
            return value
        methods = info.data.get("methods", {}).values()
        # Patches are many times larger than features: a method's wish for them is asked for.
        local = [scoring.GL_MCM] if any(LOCAL in columns_of(m) for m in methods) else []
        return [*posthoc.USABLE, scoring.NEG_LABEL, *local]

    @field_validator("scores")
    @classmethod
    def _known_scores(cls, scores: list[str]) -> list[str]:
        for name in scores:
            if wrong := scoring.problem(name):
                raise ValueError(wrong)
        return list(dict.fromkeys(scores))

    @field_validator("compare")
    @classmethod
    def _known_reference(cls, compare: CompareConfig) -> CompareConfig:
        if compare.reference is not None and (wrong := scoring.problem(compare.reference)):
            raise ValueError(f"reference: {wrong}")
        return compare

    @field_validator("methods")
    @classmethod
    def _known_params(cls, methods: dict[str, MethodConfig]) -> dict[str, MethodConfig]:
        for name in methods:
            check_name(name, "method")
        problems = [
            f"{name}.{problem}"
            for name, method in methods.items()
            for problem in posthoc.params_problems(method)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return methods


def with_local_features(config: PipelineConfig) -> PipelineConfig:
    """`config` with a feature of each patch embedded, where a method or a score reads them."""
    methods = any(LOCAL in columns_of(method) for method in config.methods.values())
    if not methods and not scoring.reads_local(config.scores):
        return config
    settings = config.embed.model_copy(update={"local_features": True})
    return config.model_copy(update={"embed": settings})


def open_checked(config: PipelineConfig) -> Benchmark:
    """The benchmark, once it is known that it has what the methods need.

    Raises:
        ConfigError: with everything that is missing, before any work is done.
    """
    problems = [
        f"methods.{name}: it learns from outliers and benchmark {config.benchmark.name!r} has no "
        "set 'outliers'; add one, or choose a method that needs none"
        for name, method in config.methods.items()
        if method.needs_outliers and OUTLIERS not in config.benchmark.sets
    ]
    heads = {method.head.name for method in config.methods.values()}
    problems += [
        f"scores: {name} applies to no method of this run; it reads "
        f"{' and '.join(sorted(scoring.reads(name)))}, which these heads give: "
        f"{', '.join(n for n in HEADS if scoring.applies(name, n)) or 'none yet'}"
        for name in config.scores
        if not any(scoring.applies(name, head) for head in heads)
    ]
    try:
        found = open_benchmark(config.benchmark, shots=config.shots, imbalance=config.imbalance)
    except UserError as error:
        found_too = error.problems if isinstance(error, ConfigError) else [str(error)]
        raise ConfigError([*problems, *found_too]) from None
    num_classes, num_train = len(found.class_names), len(found.sets.get("train", ()))
    for name, method in config.methods.items():
        wrong = posthoc.params_problems(method, num_classes=num_classes, num_train=num_train)
        problems += [f"methods.{name}.{problem}" for problem in wrong]
    if problems:
        raise ConfigError(problems)
    return found


def words_again(config: PipelineConfig) -> str:
    """The words of the command line that a method's chosen setting needs beside it."""
    again = {
        "benchmark": config.benchmark.name,
        "backbone": config.backbone.name,
        "scores": f"[{','.join(config.scores)}]",
        "seeds": config.seeds,
        "shots": config.shots,
        "imbalance": config.imbalance,
        "target_tpr": config.target_tpr,
    }
    return " ".join(f"{key}={value}" for key, value in again.items() if value is not None)


def flat_params(config: Mapping[str, object]) -> dict[str, object]:
    """The configuration as flat parameters; who is in which set stands in config.yaml."""
    members = ("benchmark.sets.", "benchmark.sources.")
    return {key: v for key, v in _flat(config).items() if not key.startswith(members)}


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
