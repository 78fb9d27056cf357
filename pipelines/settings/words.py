"""The words of a run that can be checked without its plug-ins, and so without torch.

This module finds a mistyped key. `pipelines.settings.config` then lets the methods and scores check
their own values; their modules import torch, which takes longer than a user should wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import ConfigError, Section, load
from pipelines.data.benchmark_config import BenchmarkConfig
from pipelines.embed.config import EmbedConfig
from pipelines.evaluate.config import CompareConfig, EvaluateConfig, ThresholdConfig
from pipelines.register.config import RegisterConfig
from pipelines.sweep.config import SweepConfig


class RunWords(Section):
    """Every key of a run; values that only plug-ins can check are accepted as they are."""

    benchmark: BenchmarkConfig
    backbone: BackboneConfig
    methods: Any
    scores: Any
    negative_classes: str = Field(
        "nouns",
        description="words that neg_label compares images with beside the classes: a file with a "
        "word a line, a list in conf/negative_classes/, or a folder with WordNet's words in files "
        "noun.*.txt and adj.*.txt, or with its database (negative_pool=near)",
    )
    negative_pool: Literal["words", "csp", "near"] = Field(
        "words",
        description="words: of a folder, nouns and adjectives; csp: names like 'wooden structure' "
        "for the adjectives, the conjugated semantic pool of Chen 2024; near: relatives of the ID "
        "classes, of a folder with WordNet's data.noun and index.noun",
    )
    sweep: SweepConfig
    compare_defaults: bool = Field(
        True,
        description="after a sweep: train and judge the default settings too, the first seed's, "
        "and say what the chosen ones gained",
    )
    shots: int | None = Field(None, ge=1, description="training images a class; null: all")
    imbalance: float | None = Field(
        None, gt=0, le=1, description="long tail: the last class's share of the first's images"
    )
    seeds: int = Field(1, ge=1, description="number of seeds")
    target_tpr: float = Field(
        0.95, gt=0, le=1, description="share of ID images that the threshold accepts"
    )
    threshold: ThresholdConfig = ThresholdConfig()
    embed: EmbedConfig = EmbedConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    register_as: RegisterConfig = RegisterConfig()
    training: Literal["ray", "in_process"] = Field(
        "ray", description="ray: Ray Train; in_process: the same loop and bytes without it"
    )
    compute: ComputeConfig = ComputeConfig()
    storage: str = Field("./outputs", description="folder or URI of everything that is kept")
    tracking_uri: str | None = Field(
        None, description="MLflow server; default: SQLite in the storage folder"
    )
    verbose: bool = Field(False, description="jobs.pipeline: print every table, not one screen")


def refuse_wrong_words(job: str, words: Sequence[str]) -> None:
    """Refuse words that are wrong whichever plug-ins the run uses.

    Where plug-ins have to check a word, all words are left to `pipelines.settings.config`, so that
    every problem is told at once.

    Args:
        job: a job that is a part of a run.
        words: of its command line.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        load(RunWords, job, words)
    except ConfigError:
        if not any(map(_is_for_plugins, words)):
            raise


def _is_for_plugins(word: str) -> bool:
    """Whether a plug-in might refuse the word; none refuses the project's methods and presets."""
    key, _, value = word.partition("=")
    if key in ("methods", "preset"):
        return "@" in value or "{" in value  # files and settings of the user's own
    if key == "scores":
        return value != "all"
    return key.startswith("methods.") or key in ("compare", "compare.reference")
