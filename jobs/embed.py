"""Images in, features out: the stage embed; `source=FOLDER` takes your own images, no labels."""

from __future__ import annotations

import sys
import time

from jobs import main
from jobs.console import Console
from pipelines.embed import own_images
from pipelines.pipeline import run
from pipelines.settings import PipelineConfig


def embed_benchmark(config: PipelineConfig) -> None:
    """Embed the benchmark's images and say where the result lies."""
    done = run(config, Console(), only="embed")
    print(f"embed: {done.storage.path('runs', done.id, 'embed.json')}")


def embed_folder(config: own_images.FolderJob) -> None:
    """Embed the images of one source, say what was rejected and where the features lie."""
    console, began = Console(), time.perf_counter()
    console.started("embed", 1, 1)
    cache = own_images.run(
        config,
        lambda done, total, bad: console.progress(done, total, f"images, {bad:,} rejected"),
    ).cache
    console.finished("embed", time.perf_counter() - began, found=False)
    rows, rejected = cache.manifest.rows, cache.manifest.rejected
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in cache.reasons().items())
    folder = cache.storage.path("cache", "features", cache.address)
    bad = f"{rejected:,} rejected" + (f" ({reasons})" if reasons else "")
    print(f"embed: {rows:,} features, {bad}: {folder}")


if __name__ == "__main__":
    about = __doc__ or ""
    if any(word.startswith("source") for word in sys.argv[1:]):
        main("embed_folder", own_images.FolderJob, embed_folder, about)
    else:
        main("embed", PipelineConfig, embed_benchmark, about)
