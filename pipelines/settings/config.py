"""The resolved configuration of a run, and what of it is checked against the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from pipelines.backbones import classifier, network
from pipelines.backbones.description import BackboneConfig
from pipelines.config import ConfigError, UserError
from pipelines.data.benchmark_config import BenchmarkConfig
from pipelines.data.benchmarks import Benchmark, open_benchmark
from pipelines.evaluate.config import CompareConfig
from pipelines.finetune.data import columns_of
from pipelines.finetune.outlier_prior import OUTLIERS
from pipelines.heads import HEADS
from pipelines.heads.base import LOCAL
from pipelines.methods import AnyMethod, MethodConfig
from pipelines.ood import FITTED_SCORES
from pipelines.records import Role, SetName, check_name
from pipelines.score import by_name as scoring
from pipelines.score import search as posthoc
from pipelines.settings.words import RunWords
from pipelines.sweep import space as search_space

# Keys that say where and how to compute and what is shown, not what: they name no other run.
NOT_CONTENT = ("storage", "tracking_uri", "compute", "verbose")


class PipelineConfig(RunWords):
    """The resolved configuration of a run; every stage takes the same words."""

    methods: dict[str, AnyMethod] = Field(min_length=1, description="what is compared")
    scores: list[str] = Field(
        min_length=1,
        description="what judges every head: names, sums A+B; all: every score of similarities, "
        "neg_label, gl_mcm where a method reads local features, for an image classifier what is "
        "fitted to its features, and the methods' selection criteria",
    )

    @field_validator("scores", mode="before")
    @classmethod
    def _all_scores(cls, value: Any, info: ValidationInfo) -> Any:
        if value != "all":
            return value
        methods = info.data.get("methods", {}).values()
        # Patches are many times larger than features: a method's wish for them is asked for.
        local = [scoring.GL_MCM] if any(LOCAL in columns_of(m) for m in methods) else []
        # What needs a classifier's activations is made for it, and so are densities of features.
        is_network = any(HEADS[method.head.name].has_activations for method in methods)
        fitted = FITTED_SCORES if is_network else ()
        # A density that is a method's own would else be judged by what it has no part in.
        own = [method.score for method in methods]
        every = list(dict.fromkeys([*posthoc.USABLE, scoring.NEG_LABEL, *local, *fitted, *own]))
        benchmark = info.data.get("benchmark")
        if isinstance(benchmark, BenchmarkConfig) and not benchmark.every_class:
            every = [name for name in every if not scoring.needs_every_class(name)]
        backbone = info.data.get("backbone")
        if not (isinstance(backbone, BackboneConfig) and backbone.layers):
            every = [name for name in every if not scoring.reads_layers([name])]
        return [n for n in every if any(scoring.applies(n, m.head.name) for m in methods)]

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
        f"{', '.join(n for n in HEADS if scoring.applies(name, n))}"
        for name in config.scores
        if not any(scoring.applies(name, head) for head in heads)
    ]
    problems += [
        f"scores: {name} is fitted to the training images of every class, and benchmark "
        f"{config.benchmark.name!r} shows only some (benchmark.every_class=false); leave it out"
        for name in config.scores
        if not config.benchmark.every_class and scoring.needs_every_class(name)
    ]
    problems += [
        f"scores: {name} reads layers of the network, and backbone {config.backbone.name!r} names "
        "none; backbone.layers={PLACE: CHANNELS, ...} does"
        for name in config.scores
        if not config.backbone.layers and scoring.reads_layers([name])
    ]
    try:
        tail = config.imbalance or config.benchmark.imbalance
        found = open_benchmark(config.benchmark, shots=config.shots, imbalance=tail)
    except UserError as error:
        found_too = error.problems if isinstance(error, ConfigError) else [str(error)]
        raise ConfigError([*problems, *found_too]) from None
    num_classes, num_train = len(found.class_names), len(found.sets.get("train", ()))
    for name, method in config.methods.items():
        wrong = posthoc.params_problems(method, num_classes=num_classes, num_train=num_train)
        problems += [f"methods.{name}.{problem}" for problem in wrong]
    problems += _full_spectrum_problems(config)
    problems += _network_problems(config)
    problems += _backbone_problems(config, found.class_names)
    if problems:
        raise ConfigError(problems)
    return found


def searched_networks(config: PipelineConfig) -> list[str]:
    """The methods that train whole networks and whose settings are searched."""
    space = config.sweep.space if config.sweep.enabled else {}
    return [n for n, m in config.methods.items() if m.network is not None and space.get(n)]


def _sweep_problems(config: PipelineConfig) -> list[str]:
    """What is wrong with a search space that would be seen after networks are trained only."""
    if not config.sweep.enabled or all(m.network is None for m in config.methods.values()):
        return []
    problems = []
    try:
        search_space.check_names(config.sweep.space, config.methods)
        for name, method in config.methods.items():
            for key in config.sweep.space.get(name, ()):
                search_space.check_key(method, key, name)
    except UserError as error:
        problems.append(str(error))
    return problems + [
        f"sweep.space.{name}: a network's settings are chosen by scores of its logits, and "
        f"scores=[{','.join(config.scores)}] holds none; add energy"
        for name in searched_networks(config)
        if not posthoc.usable(config.scores, config.methods[name].head.name)
    ]


def _full_spectrum_problems(config: PipelineConfig) -> list[str]:
    """Where shifted validation images are asked for, and the benchmark has none."""
    roles = {SetName.parse(name).role for name in config.benchmark.sets}
    needed: dict[str, tuple[Role, ...]] = {}
    if config.threshold.known == "full_spectrum":
        needed["threshold.known"] = ("validation_shifted",)
    if config.register_as.criterion == "full_spectrum":
        needed["register_as.criterion"] = ("validation_shifted", "validation_ood")
    return [
        f"{key}=full_spectrum: benchmark {config.benchmark.name!r} has no set {role}/NAME; add one"
        for key, wanted in needed.items()
        for role in wanted
        if role not in roles
    ]


def _network_problems(config: PipelineConfig) -> list[str]:
    """What does not go together of methods that train whole networks and the backbone."""
    problems = _sweep_problems(config)
    trains = {n: m.network for n, m in config.methods.items() if m.network is not None}
    starts = {name: how.start for name, how in trains.items()}
    for name, start in starts.items():
        seen = [name]
        while start in starts and start not in seen:
            seen.append(start)
            start = starts[start]
        if start in seen or start not in ("backbone", "random"):
            problems.append(
                f"methods.{name}.head.train.start={starts[name]}: allowed are backbone, random, or "
                "a method of the run that trains a network and does not start from this one"
            )
        elif starts[name] in starts and trains[name].backbone is not None:
            problems.append(
                f"methods.{name}.head.train.backbone: it starts from {starts[name]} and so has "
                "that one's architecture; leave it out"
            )
    return problems + [
        f"methods.{name}: backbone {backbone.name!r} has no weights (untrained=true); "
        "allowed: methods with head.train.start=random, or that start from one of these"
        for name, backbone in _backbones(config).items()
        if backbone.untrained and starts.get(name, "backbone") == "backbone"
    ]


def _backbones(config: PipelineConfig) -> dict[str, BackboneConfig]:
    """By method, its own backbone or the run's; without those that start from another method."""
    return {
        name: (method.network and method.network.backbone) or config.backbone
        for name, method in config.methods.items()
        if method.network is None or method.network.start not in config.methods
    }


def _backbone_problems(config: PipelineConfig, class_names: Sequence[str]) -> list[str]:
    """What methods need of their backbones and these have not: a text tower, or the classes."""
    kinds = {"text": "a vision-language model", "classifier": "an image classifier"}
    problems = []
    for name, backbone in _backbones(config).items():
        head, how = config.methods[name].head, config.methods[name].network
        has = "text" if network.has_text(backbone) else "classifier"
        wrong = [
            f"methods.{name}: head={head.name} needs {kinds[need]}, and backbone "
            f"{backbone.name!r} is {kinds[has]}"
            for need in head.needs
            if need != has
        ]
        # A network that is trained from scratch has the benchmark's classes, whatever they are.
        if not wrong and "classifier" in head.needs and (how is None or how.start == "backbone"):
            wrong = _class_problems(backbone, class_names)
        problems += wrong
    return list(dict.fromkeys(problems))


def _class_problems(backbone: BackboneConfig, class_names: Sequence[str]) -> list[str]:
    """The benchmark's classes that a classifier does not know."""
    try:
        known = classifier.class_names(backbone)
    except UserError as error:
        return [str(error)]
    if not known:
        return [f"backbone {backbone.name}: class_names are missing, the rows of its last layer"]
    unknown = [name for name in class_names if name not in known]
    return [classifier.unknown_classes(backbone.name, unknown, known)] if unknown else []


def words_again(config: PipelineConfig) -> str:
    """The words of the command line that a method's chosen setting needs beside it."""
    threshold = config.threshold.model_dump(exclude_defaults=True)
    again = {
        "benchmark": config.benchmark.name,
        "backbone": config.backbone.name,
        "scores": f"[{','.join(config.scores)}]",
        "seeds": config.seeds,
        "shots": config.shots,
        "imbalance": config.imbalance,
        "target_tpr": config.target_tpr,
        **{f"threshold.{key}": value for key, value in threshold.items()},
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
