"""Images in, features out: the stage embed; `source=FOLDER` takes your own images, no labels."""

from __future__ import annotations

import sys

from jobs import main
from jobs.console import Console
from pipelines import embed
from pipelines.pipeline import PipelineConfig, run


def embed_benchmark(config: PipelineConfig) -> None:
    """Embed the benchmark's images and say where the result lies."""
    done = run(config, Console(), only="embed")
    print(f"embed: {done.storage.path('runs', done.id, 'embed.json')}")


def embed_folder(config: embed.FolderJob) -> None:
    """Embed the images of one source and say where the features lie."""
    console = Console()
    console.started("embed", 1, 1)
    cache = embed.run(
        config,
        lambda done, total, bad: console.progress(done, total, f"images, {bad} rejected"),
    )
    rows, rejected = cache.manifest["rows"], cache.manifest["rejected"]
    folder = cache.storage.path("cache", "features", cache.address)
    print(f"\nembed: {rows} features, {rejected} rejected: {folder}")


if __name__ == "__main__":
    about = __doc__ or ""
    if any(word.startswith("source") for word in sys.argv[1:]):
        main("embed_folder", embed.FolderJob, embed_folder, about)
    else:
        main("embed", PipelineConfig, embed_benchmark, about)
