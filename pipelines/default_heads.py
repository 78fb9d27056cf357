"""The default settings of a run beside its chosen ones: what of them is trained, judged, compared.

`finetune.json` names their heads under `defaults` and what was fitted for them under
`default_records`, so nothing that reads `heads` sees them (`pipelines.evaluate.against_default`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from pipelines.evaluate import against_default
from pipelines.evaluate.against_default import SEEDS, Default, head_name
from pipelines.evaluate.stage import Scored
from pipelines.finetune.loop import TrainingJob
from pipelines.records import HeadKey
from pipelines.run import Run
from pipelines.score import by_name as scoring
from pipelines.score.result import HeadScores

VARIANTS: tuple[Literal["chosen", "default"], ...] = ("chosen", "default")


def compared(run: Run) -> dict[str, Default]:
    """The settings that the chosen ones are compared with; none where nothing was searched."""
    if not (run.config.sweep.enabled and run.config.compare_defaults):
        return {}
    chosen = run.manifest("sweep")["methods"]
    num_train = len(run.benchmark.sets["train"])
    return against_default.defaults(
        run.config.methods, chosen, run.config.scores, num_train=num_train
    )


def to_train(run: Run) -> dict[tuple[str, int], TrainingJob]:
    """The default settings that train another head than the chosen ones, by (name, seed)."""
    return {
        (head_name(name), seed): TrainingJob(default.method, seed)
        for name, default in compared(run).items()
        for seed in range(min(SEEDS, run.config.seeds))
        if default.trains
    }


def apart(run: Run, heads: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The chosen heads and the default ones under keys of their own.

    Args:
        run: whose heads they are.
        heads: addresses by name, those of `to_train` among them.
    """
    defaults = {
        name: list(heads[head_name(name) if default.trains else name])[:SEEDS]
        for name, default in compared(run).items()
    }
    return {"heads": {name: heads[name] for name in run.config.methods}, "defaults": defaults}


def to_score(run: Run) -> list[HeadScores]:
    """The heads of the default settings, judged by the default parameters."""
    manifest, standing = run.manifest("finetune"), compared(run)
    found = []
    for method, addresses in manifest.get("defaults", {}).items():
        for seed, address in enumerate(addresses):
            records = manifest["default_records"][method][seed]
            params = fitting(run, method, standing[method].scores, records)
            key = HeadKey(method=method, seed=seed, variant="default")
            found.append(HeadScores(key=key, address=address, fitted=records, scores=params))
    return found


def fitting(
    run: Run, method: str, chosen: Mapping[str, Any], records: Mapping[str, str]
) -> dict[str, Any]:
    """The chosen scores that have what they need: ViM is left out for a head that is not linear."""
    head = run.config.methods[method].head.name
    return {
        name: params
        for name, params in chosen.items()
        if set(scoring.records_read(name)) <= set(records) and scoring.applies(name, head)
    }


def rows(
    run: Run, tables: Mapping[HeadKey, pa.Table], chosen: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The table best against default; this opens the default heads' test scores.

    Args:
        run: that was scored.
        tables: scores of every head, the default ones among them.
        chosen: `methods` of `sweep.json`.
    """
    places = [
        (method, seed)
        for method, heads in run.manifest("finetune").get("defaults", {}).items()
        for seed in range(len(heads))
    ]
    found = {
        variant: {
            (m, seed): Scored(tables[HeadKey(method=m, seed=seed, variant=variant)])
            for m, seed in places
        }
        for variant in VARIANTS
    }
    return against_default.rows(
        found["chosen"], found["default"], chosen, compared(run), run.config.evaluate
    )
