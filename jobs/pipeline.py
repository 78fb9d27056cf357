"""The whole path: train, embed, sweep, finetune, score, evaluate, register; preset=demo: a demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import main, run_section

if TYPE_CHECKING:
    from pipelines.settings.config import PipelineConfig


def pipeline(config: PipelineConfig) -> None:
    """Run what is not done yet, then print what came out on one screen, and what to do next."""
    from jobs.console import Console, show
    from pipelines.config.secrets import mask_uri
    from pipelines.pipeline import run

    with Console() as console:
        done = run(config, console)
    champion, store = done.champion, mask_uri(done.store_uri)
    commands = [
        ("report", done.storage.path("runs", done.id, "report.html")),
        ("MLflow", f"mlflow ui --backend-store-uri {store}"),
        ("one image", f"python -m jobs.predict source=PATH storage={done.storage.root}"),
    ]
    print()
    if not config.verbose:
        from pipelines.report.screen import summary

        show(summary(done.metrics, champion, commands))
        return
    from pipelines.report.text import text_table

    print(text_table(done.metrics))
    print(f"\nmodel      {champion.uri} ({champion.method} + {champion.score})")
    for name, command in commands:
        print(f"{name:<9}  {command}")


if __name__ == "__main__":
    main("pipeline", run_section, pipeline, __doc__)
