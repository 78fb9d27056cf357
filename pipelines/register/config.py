"""The section `register_as`: what is registered, and under which name."""

from __future__ import annotations

from pydantic import Field

from pipelines.config import Section

AUTO = "auto"


class RegisterConfig(Section):
    """What is registered, and under which name."""

    name: str = Field("energy-ood", pattern=r"^[\w. -]+$", description="name in the model registry")
    alias: str = Field("champion", pattern=r"^[\w-]+$", description="alias of the version to use")
    method: str = Field(AUTO, description="auto: chosen on validation data; or a method's name")
    score: str = Field(AUTO, description="auto: chosen on validation data; or a score's name")
