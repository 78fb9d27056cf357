"""The whole path: embed, sweep, finetune, score, evaluate, register. `make demo` runs this."""

from __future__ import annotations

from jobs import main
from jobs.console import Console
from pipelines.evaluate.metrics import Metrics
from pipelines.pipeline import run
from pipelines.report.text import text_table
from pipelines.settings import PipelineConfig


def pipeline(config: PipelineConfig) -> None:
    """Run what is not done yet, then print the table and what to do next."""
    done = run(config, Console())
    folder = done.storage.path("runs", done.id)
    registered = done.manifest("register")
    store = config.tracking_uri or done.tracker.uri
    metrics = done.storage.read_bytes("runs", done.id, "metrics.json")
    print("\n" + text_table(Metrics.from_json(metrics, f"{folder}/metrics.json")))
    print(f"\nreport     {folder}/report.html")
    print(f"model      {registered['uri']} ({registered['method']} + {registered['score']})")
    print(f"MLflow     mlflow ui --backend-store-uri {store}")
    print(f"one image  python -m jobs.predict source=PATH storage={done.storage.root}")


if __name__ == "__main__":
    main("pipeline", PipelineConfig, pipeline, __doc__ or "")
