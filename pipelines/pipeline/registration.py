"""What is registered: the champion, with everything that its verdicts need."""

from __future__ import annotations

from pipelines.data.features import LOCAL
from pipelines.evaluate.scored import Scored
from pipelines.finetune.cache import load_predictor
from pipelines.register import choose
from pipelines.register import stage as register
from pipelines.register.calibration import Calibration
from pipelines.register.result import RegisterResult
from pipelines.run import Run
from pipelines.run.space import FeatureSpace
from pipelines.score import by_name as scoring
from pipelines.score import stage as score
from pipelines.score.cache import load_records


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


def hand_register(run: Run) -> RegisterResult:
    """The champion as a candidate, with everything that its verdicts need."""
    method, name = choose.champion(
        run.methods,
        run.config.scores,
        run.swept.methods,
        run.config.register_as,
        accuracy_tolerance=run.config.sweep.accuracy_tolerance,
    )
    row, head = run.metrics.row(method, name), run.finetuned.head(method)
    space = run.space_of(head.key)
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
        known_scores=Scored(score.read_one(run.storage, run.scored, head.key)).scores(
            name, "validation"
        ),
    )
    return register.register(
        candidate, run.tracker, run.tracking_run, settings=run.config.register_as
    )
