"""What a benchmark's YAML says: classes, prompts, sources, and which rows are in which set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from pipelines.config import Section, UserError
from pipelines.data.digits import DigitsSource
from pipelines.data.names import check_set, refuse_similar
from pipelines.data.sources import AnySource
from pipelines.data.stored_lists import read_list
from pipelines.records import check_name

BenchmarkSource = Annotated[AnySource | DigitsSource, Field(discriminator="kind")]


class SetConfig(Section):
    """Which rows of which source are in a set; every given condition holds."""

    source: list[str] = Field(min_length=1, description="a source's name, or several")
    classes: list[str] | None = Field(
        None, description="class names; id: the benchmark's; FILE#KEY: a list in a JSON file"
    )
    not_classes: list[str] = Field([], description="left out, in the same words")
    domains: list[str] | None = Field(None, description="styles taken")
    not_domains: list[str] = Field([], description="styles left out")
    splits: list[str] | None = Field(
        None,
        description="splits taken; rows of a source without splits are train (80 %) or test, "
        "by the hash of their key",
    )
    fraction: tuple[float, float] = Field(
        (0.0, 1.0), description="the share of keys taken, [from, to) of the hash order"
    )
    per_class: int | None = Field(None, ge=1, description="at most so many images a class")
    not_keys: list[str] = Field(
        [], description="images left out, by key; FILE#KEY: a list in a JSON file"
    )

    @field_validator("source", "classes", "not_classes", "not_keys", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class BenchmarkConfig(Section):
    """A benchmark: classes, prompts, sources, and the sets taken from them."""

    name: str = Field(description="the name in tables")
    root: str = Field("", description="where its files are")
    held_out: str | None = Field(None, description="the domain left out of training")
    class_names: list[str] = Field(
        min_length=2, description="the ID classes, in label order; FILE#KEY: a list in a JSON file"
    )
    templates: list[str] = Field(
        ["a photo of a {}."], min_length=1, description="prompts; {} stands for the class name"
    )
    every_class: bool = Field(
        True,
        description="false: its ID sets show only some of the classes, and no score is fitted to "
        "classes",
    )
    imbalance: float | None = Field(
        None,
        gt=0,
        le=1,
        description="long tail of the training images, unless the run says another: the last "
        "class's share of the first one's",
    )
    notes: str = Field("", description="printed under every table")
    sources: dict[str, Annotated[list[BenchmarkSource], Field(min_length=1)]] = Field(
        description="image sources; of a list, the first that exists"
    )
    sets: dict[str, SetConfig] = Field(
        description="which rows of which source are in which set; null: no such set"
    )

    @field_validator("class_names", mode="before")
    @classmethod
    def _stored_names(cls, value: Any) -> Any:
        try:
            return read_list(value) if isinstance(value, str) and "#" in value else value
        except UserError as error:
            raise ValueError(str(error)) from None

    @field_validator("sets", mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: chosen for name, chosen in value.items() if chosen is not None}

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {k: v if isinstance(v, list) else [v] for k, v in value.items()}

    @field_validator("templates")
    @classmethod
    def _one_gap(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r} needs {{}} once, where the class name goes")
        return templates

    @model_validator(mode="after")
    def _known_names(self) -> BenchmarkConfig:
        if not (self.name + self.notes.replace("\n", " ")).isprintable():
            raise ValueError("name or notes: signs that cannot be printed, such as an escape")
        refuse_similar(self.class_names)
        for name in self.sources:
            check_name(name, "source")
        for name, chosen in self.sets.items():
            check_set(name)
            if len(set(chosen.source)) < len(chosen.source):
                raise ValueError(f"set {name!r}: a source stands there twice")
            if missing := [s for s in chosen.source if s not in self.sources]:
                known = ", ".join(self.sources)
                raise ValueError(f"set {name!r}: no source {missing[0]!r}; allowed: {known}")
        if "test" not in self.sets:
            raise ValueError("sets: a benchmark needs the set 'test'")
        return self
