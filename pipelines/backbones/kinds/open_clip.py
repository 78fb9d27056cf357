"""Vision-language models that open_clip knows by name, or that a JSON file describes."""

from __future__ import annotations

from pipelines.backbones import clip, open_clip_files
from pipelines.backbones.tower import BackboneKind

PLUGIN = BackboneKind(
    open_clip_files.resolve,
    open_clip_files.identity,
    clip.cropping,
    clip.load,
    code=(clip.load, clip.cropping),
    has_text=True,
)
