"""What is registered: the champion, with everything that its verdicts need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.data.features import LOCAL
from pipelines.evaluate.scored import Scored
from pipelines.finetune.cache import load_predictor
from pipelines.records import SetName
from pipelines.register import choose
from pipelines.register import stage as register
from pipelines.register.calibration import Calibration
from pipelines.register.choose import OnValidation, ValidatedChoice
from pipelines.register.examples import Examples
from pipelines.register.result import RegisterResult
from pipelines.run import Run
from pipelines.run.space import FeatureSpace
from pipelines.score import by_name as scoring
from pipelines.score import search as posthoc
from pipelines.score import stage as score
from pipelines.score.cache import load_records, read_manifest


def _calibration(space: FeatureSpace, address: str) -> Calibration:
    """Of a head's confidence; the softmax as it is where no ID validation image is given."""
    if not {"validation", "test"} <= set(space.run.benchmark.sets):
        return Calibration()
    predictor = load_predictor(space.storage, address)
    known = []
    for name in ("validation", "test"):
        images = space.sets.load(name)
        local = space.sets.column(name, LOCAL) if predictor.takes_local else None
        known.append((images.features, local, images.labels))
    return Calibration.of(predictor, *known)


def full_spectrum(tables: Mapping[str, Scored], scores: Sequence[str]) -> dict[str, OnValidation]:
    """What validation says of each method where shifted images count as ID (Yang 2023).

    Args:
        tables: scores of a head by method; with sets of the roles validation, validation_shifted
            and validation_ood.
        scores: those of the run.
    """
    found = {}
    for method, head in tables.items():
        known = head.of_validation("full_spectrum")
        unknown = [name for name in head.sets if SetName.parse(name).role == "validation_ood"]
        found[method] = OnValidation(
            float(np.concatenate([head.correct(name) for name in known]).mean()),
            {
                score: posthoc.judge(
                    {}, [head.scores(score, *known), *(head.scores(score, n) for n in unknown)]
                )
                for score in scores
                if head.has(score)
            },
        )
    return found


def _validated(run: Run) -> Mapping[str, ValidatedChoice]:
    """What validation says of each method, by the criterion of `register_as`."""
    if run.config.register_as.criterion == "standard":
        return run.swept.methods
    heads = {name: run.finetuned.head(name).key for name in run.methods}
    tables = {n: Scored(score.read_one(run.storage, run.scored, k)) for n, k in heads.items()}
    return full_spectrum(tables, run.config.scores)


def _examples(space: FeatureSpace, per_class: int) -> Examples | None:
    """Training images that the model carries."""
    if not per_class or "train" not in space.run.benchmark.sets:
        return None
    return Examples.of(space.sets.load("train"), per_class)


def _words(space: FeatureSpace, fitted: Mapping[str, str]) -> tuple[str, ...]:
    """The negative words among what was fitted for the champion's score."""
    if scoring.NEG_LABEL not in fitted:
        return ()
    return read_manifest(space.storage, fitted[scoring.NEG_LABEL]).words


def hand_register(run: Run) -> RegisterResult:
    """The champion as a candidate, with everything that its verdicts need."""
    method, name = choose.champion(
        run.methods,
        run.config.scores,
        _validated(run),
        run.config.register_as,
        accuracy_tolerance=run.config.sweep.accuracy_tolerance,
    )
    row, head = run.metrics.row(method, name), run.finetuned.head(method)
    space = run.space_of(head.key)
    table = Scored(score.read_one(run.storage, run.scored, head.key))
    needed = {record: head.fitted[record] for record in scoring.records_read(name)}
    candidate = register.Candidate(
        predictor=load_predictor(run.storage, head.address),
        backbone=space.backbone,
        method=method,
        score=name,
        params=row.params,
        threshold=row.threshold,
        target_tpr=run.config.target_tpr,
        class_names=run.benchmark.class_names,
        decoding=run.config.embed.decoding(space.backbone.lossless_to),
        batch_size=run.config.embed.batch_size,
        facts={"run": run.id, "benchmark": run.benchmark.name},
        records=load_records(run.storage, needed),
        calibration=_calibration(space, head.address),
        known_scores=table.scores(name, *table.of_validation(run.config.threshold.known)),
        examples=_examples(space, run.config.register_as.examples),
        words=_words(space, needed),
    )
    return register.register(
        candidate, run.tracker, run.tracking_run, settings=run.config.register_as
    )
