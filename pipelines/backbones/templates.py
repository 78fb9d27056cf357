"""Prompt templates by name; `{}` stands for the class name."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.config import UserError

NAMES = ("simple", "plain", "imagenet7", "imagenet80")


def templates(name: str) -> tuple[str, ...]:
    """The template set of that name; the last two are Radford et al. 2021's.

    Raises:
        UserError: for an unknown name.
    """
    if name not in NAMES:
        raise UserError(f"templates={name!r}: allowed: {', '.join(sorted(NAMES))}")
    if name == "simple":
        return ("a photo of a {}.",)
    if name == "plain":
        return ("{}",)
    from open_clip import zero_shot_metadata as published  # takes seconds, so only where wanted

    # open_clip keeps the lists as functions of the class name.
    chosen = {
        "imagenet7": published.SIMPLE_IMAGENET_TEMPLATES,
        "imagenet80": published.OPENAI_IMAGENET_TEMPLATES,
    }
    return tuple(template("{}") for template in chosen[name])


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
