"""Your own images through `embed`: `python -m jobs.embed source=FOLDER backbone=...`.

No label is needed. With class names, the text features of their prompts are kept beside the
images' (the zero-shot classifier), and `odin.eps=` takes ODIN's input step first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipelines.backbones import network, templates
from pipelines.backbones.class_texts import refuse_equal_prompts
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.input_step import InputStep
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import Section, UserError
from pipelines.data import files
from pipelines.data.features import FeatureCache
from pipelines.data.limits import LIMITS
from pipelines.data.names import refuse_similar
from pipelines.data.shards import Progress
from pipelines.data.sources import AnySource, open_source
from pipelines.data.storage import Storage
from pipelines.embed.config import EmbedConfig
from pipelines.embed.stage import embed_source
from pipelines.embed.text import text_features
from pipelines.ood import ODIN
from pipelines.store.errors import said_clearly


class OdinConfig(Section):
    """ODIN's input step: features of their own, made with a gradient (Liang et al. 2018)."""

    tau: float = Field(1000.0, gt=0, description="temperature of the step and of the score")
    eps: float = Field(0.0014, ge=0, description="size of the step, in units of a pixel in [0, 1]")


class FolderJob(Section):
    """What `python -m jobs.embed source=FOLDER backbone=...` takes: images and a backbone."""

    source: str | AnySource = Field(
        description="a folder, Parquet file or tar archive (or a folder of those), or its URI; or "
        "a mapping with kind=folder, parquet or tar"
    )
    backbone: BackboneConfig
    class_names: str | None = Field(
        None, description="file with a class name a line: their text features are kept too"
    )
    templates: str = Field(
        "simple",
        description="prompts of the class names: a file with a prompt a line ({} stands for the "
        "name), or one of " + ", ".join(templates.NAMES),
    )
    odin: OdinConfig | None = Field(None, description="take ODIN's input step; needs class_names")
    embed: EmbedConfig = EmbedConfig()
    compute: ComputeConfig = ComputeConfig()
    storage: str = Field("./outputs", description="folder or URI of everything that is kept")

    @model_validator(mode="after")
    def _odin_has_classes(self) -> FolderJob:
        if self.odin is not None and self.class_names is None:
            raise ValueError("odin moves images towards their class: give class_names=FILE too")
        return self


@dataclass(frozen=True)
class Done:
    """What a job has made or found.

    Attributes:
        cache: the images' features.
        text: the zero-shot classifier (K, D), or None without class names.
    """

    cache: FeatureCache
    text: NDArray[np.float32] | None


def run(config: FolderJob, on_progress: Progress | None = None) -> Done:
    """The features of images that belong to no benchmark; no label is needed.

    Raises:
        UserError: see `pipelines.embed.stage.embed_sources`; a file of names that cannot be used;
            a storage that cannot be written.
    """
    with said_clearly(Storage.open(config.storage)):
        return _run(config, on_progress)


def _run(config: FolderJob, on_progress: Progress | None) -> Done:
    storage = Storage.open(config.storage)
    source = open_source(config.source) if isinstance(config.source, str) else config.source
    names = None if config.class_names is None else read_class_names(config.class_names)
    prompts = _templates(config.templates)
    source.index()  # an empty folder is said before a backbone is looked for
    backbone = network.resolve(config.backbone, storage, device=config.compute.embed_device)
    text = None
    if names is not None:
        if not network.has_text(backbone):
            raise UserError(
                f"backbone {backbone.name} is an image classifier: class_names=FILE is for models "
                "that read texts; its own classes stand in backbone.class_names"
            )
        refuse_equal_prompts(names, prompts, backbone)
        text = text_features(names, prompts, backbone, storage)
    step = None
    if config.odin is not None and text is not None:
        scale = network.load(backbone).logit_scale
        step = InputStep(ODIN.fit(text * scale, tau=config.odin.tau), config.odin.eps)
    cache = embed_source(
        source,
        "images",
        backbone,
        storage,
        settings=config.embed,
        compute=config.compute,
        pixel_pass=step,
        on_progress=on_progress,
    )
    return Done(cache, text)


def read_class_names(path: str) -> list[str]:
    """The class names in a text file, one a line.

    Raises:
        UserError: as `read_lines`, and where two have one name but for case.
    """
    names = read_lines(path, "class_names")
    try:
        refuse_similar(names)
    except ValueError as error:
        raise UserError(f"class_names={path}: {error}") from None
    return names


def read_lines(path: str, key: str) -> list[str]:
    """The lines of a text file without blank ones.

    Raises:
        UserError: where it is missing, empty, or holds a line twice.
    """
    try:
        text = files.read(str(files.here(path)), LIMITS.text_bytes).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={path}: not readable as text ({error})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{key}={path}: no line in it; write one name a line")
    if len(set(lines)) < len(lines):
        twice = next(line for line in lines if lines.count(line) > 1)
        raise UserError(f"{key}={path}: {twice!r} stands there twice")
    return lines


def _templates(name: str) -> Sequence[str]:
    if name in templates.NAMES:
        return templates.templates(name)
    if not Path(name).expanduser().is_file():
        known = ", ".join(templates.NAMES)
        raise UserError(f"templates={name}: no such file; or one of {known}")
    return read_lines(name, "templates")
