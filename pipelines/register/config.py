"""The section `register_as`: what is registered, and under which name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.config import Section

AUTO = "auto"


class RegisterConfig(Section):
    """What is registered, and under which name."""

    name: str = Field("energy-ood", pattern=r"^[\w. -]+$", description="name in the model registry")
    alias: str = Field("champion", pattern=r"^[\w-]+$", description="alias of the version to use")
    method: str = Field(AUTO, description="auto: chosen on validation data; or a method's name")
    score: str = Field(AUTO, description="auto: chosen on validation data; or a score's name")
    criterion: Literal["standard", "full_spectrum"] = Field(
        "standard",
        description="of auto: AUROC of ID validation against the unknown, as the sweep has it; "
        "full_spectrum: of these and validation_shifted/NAME against validation_ood/NAME",
    )
    examples: int = Field(
        20,
        ge=0,
        description="training images a class, of which the model keeps key, class and feature: "
        "jobs.predict explain=true names those that an image is like; 0: none",
    )
