"""Prompt templates by name; `{}` stands for the class name."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from pipelines.config import UserError

TEMPLATES: dict[str, tuple[str, ...]] = {
    "simple": ("a photo of a {}.",),
    "plain": ("{}",),
    # open_clip keeps the published lists (Radford et al. 2021) as functions of the class name.
    "imagenet7": tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES),
    "imagenet80": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
}


def templates(name: str) -> tuple[str, ...]:
    """The template set of that name.

    Raises:
        UserError: for an unknown name.
    """
    if name not in TEMPLATES:
        raise UserError(f"templates={name!r}: allowed: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def fill(template: str, class_name: str) -> str:
    """The prompt of one class.

    Raises:
        UserError: where `template` has not exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise UserError(f"template {template!r}: write {{}} once, where the class name goes")
    return template.replace("{}", class_name)


def prompts(class_names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """All prompts, class by class, template by template: length K * T."""
    return [fill(template, name) for name in class_names for template in chosen]
