"""The miniature vision-language model that the project trains itself, on first use."""

from __future__ import annotations

from pipelines.backbones import clip, open_clip_files
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.tower import BackboneKind, OnProgress
from pipelines.data.storage import Storage


def resolve(
    config: BackboneConfig, storage: Storage, on_progress: OnProgress | None = None
) -> BackboneConfig:
    """The same backbone with its files named, trained where they are missing.

    Raises:
        UserError: where `storage` is not a folder of this machine.
    """
    if config.path is not None:
        return config
    from pipelines.backbones import mini  # here: the training code is seldom needed

    described, weights = mini.ensure(storage, on_progress)
    return config.model_copy(update={"config": str(described), "path": str(weights)})


PLUGIN = BackboneKind(
    resolve,
    open_clip_files.identity,
    clip.cropping,
    clip.load,
    code=(clip.load, clip.cropping),
    has_text=True,
)
