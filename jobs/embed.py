"""Images in, features out: the stage embed; `source=FOLDER` takes your own images, no labels."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from jobs import main, stage_main

if TYPE_CHECKING:
    from pipelines.embed.own_images import FolderJob


def section() -> type[FolderJob]:
    """What `source=FOLDER` takes."""
    from pipelines.embed.own_images import FolderJob

    return FolderJob


def embed_folder(config: FolderJob) -> None:
    """Embed the images of one source, say what was rejected and where the features lie."""
    from jobs.console import Console
    from pipelines.embed import own_images

    began = time.perf_counter()
    with Console() as console:
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
    if any(word.startswith("source") for word in sys.argv[1:]):
        main("embed_folder", section, embed_folder, __doc__)
    else:
        stage_main("embed", __doc__)
