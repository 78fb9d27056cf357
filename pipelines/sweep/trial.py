"""One trial: train a head with one setting, then search every score's parameters on arrays.

A trial's record lies at `cache/trials/ADDRESS.json`, found again by its content: the setting, the
validation data, the backbone, the code. A setting that fails (a loss that is no number, a value
that the method refuses) has a record too, with the reason, so that it is not tried again.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipelines.backbones import clip as backbones
from pipelines.backbones.clip import BackboneConfig
from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSet
from pipelines.data.storage import Storage
from pipelines.finetune.loop import OnHead, Trained, TrainingData, TrainingJob, train_in_process
from pipelines.finetune.together import train_together
from pipelines.fitted import search as fitted_search
from pipelines.fitted.plan import FitData
from pipelines.heads import Predictor
from pipelines.methods import MethodConfig
from pipelines.score import by_name as scoring
from pipelines.score import comparing_search
from pipelines.score import search as posthoc
from pipelines.score.search import PostHocConfig
from pipelines.sweep.space import parse_method

logger = logging.getLogger(__name__)

TRIALS = ("cache", "trials")

# What a setting of a score is judged on.
JudgedOn: TypeAlias = Literal["validation_ood", "outliers", "held_out_classes"]
Spec: TypeAlias = Mapping[str, Any]
Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Shared:
    """What every trial works on; put once into Ray's object store.

    Attributes:
        data: what heads are trained on.
        validation: ID images.
        ood: what stands for the unknown, by name; empty where classes are held out in turn.
        judged_on: where `ood` comes from.
        backbone, storage: where the text tower and the records are.
        scores: names.
        posthoc: what is searched of every score.
        fit_data: what scores are fitted to, where there is one that is.
        methods: the run's, by name.
        local: patches (N, P, D) by set name, for heads and scores that read them.
        records: the mined words of neg_label.
    """

    data: TrainingData
    validation: FeatureSet
    ood: Mapping[str, FeatureSet]
    judged_on: JudgedOn
    backbone: BackboneConfig
    storage: Storage
    scores: tuple[str, ...]
    posthoc: PostHocConfig
    fit_data: FitData | None = None
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    local: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    records: scoring.Records = field(default_factory=dict)

    def load_backbone(self) -> backbones.Clip:
        """The backbone, loaded once in each process."""
        return _loaded(self.backbone)


@functools.lru_cache(maxsize=2)
def _loaded(backbone: BackboneConfig) -> backbones.Clip:
    return backbones.load(backbone)


def has_record(storage: Storage, address: str) -> bool:
    """Whether the trial at that address is finished."""
    return storage.exists(*TRIALS, f"{address}.json")


def read_record(storage: Storage, address: str) -> Record:
    """The record of a finished trial."""
    return dict(storage.read_json(*TRIALS, f"{address}.json"))


def keep_record(record: Record, storage: Storage, address: str) -> None:
    """Write the record of a trial."""
    storage.write_json(record, *TRIALS, f"{address}.json")


def run(spec: Spec, shared: Shared, on_head: OnHead | None = None) -> Record:
    """The record of one trial: found, or made and kept; `on_head` as in `trial`."""
    if has_record(shared.storage, spec["address"]):
        return read_record(shared.storage, spec["address"])
    record = attempt(spec, lambda method: trial(method, shared, on_head))
    keep_record(record, shared.storage, spec["address"])
    return record


def run_together(specs: Sequence[Spec], shared: Shared) -> Iterator[tuple[Spec, Record]]:
    """The records of trials of one shape, trained as one batched model."""
    missing = [s for s in specs if not has_record(shared.storage, s["address"])]
    yield from ((s, read_record(shared.storage, s["address"])) for s in specs if s not in missing)
    start = time.perf_counter()
    cells = [TrainingJob(parse_method(spec["config"]), seed=0) for spec in missing]
    results = train_together(cells, shared.data, shared.load_backbone()) if cells else []
    seconds = (time.perf_counter() - start) / max(1, len(missing))
    for spec, result in zip(missing, results, strict=True):
        record = attempt(spec, functools.partial(_record_of, result, shared, seconds))
        keep_record(record, shared.storage, spec["address"])
        yield spec, record


def _record_of(
    result: Trained | UserError, shared: Shared, seconds: float, method: MethodConfig
) -> Record:
    if isinstance(result, UserError):
        raise result
    return judged(result.predictor, method, shared, best_epoch=result.best_epoch, seconds=seconds)


def attempt(spec: Spec, make: Callable[[MethodConfig], Record]) -> Record:
    """The record that `make` gives of the setting, or one that says why it failed.

    What the machine does to a worker (killed, out of memory, a storage that is gone) is no
    property of the setting: it is raised, and the sweep reports it without keeping a record.
    """
    start = time.perf_counter()
    try:
        if "problem" in spec:
            raise UserError(spec["problem"])
        return make(parse_method(spec["config"]))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if not isinstance(error, UserError):
            logger.warning("a trial failed", exc_info=True)
        return failed(error, time.perf_counter() - start)


def failed(error: Exception, seconds: float) -> Record:
    """The record of a setting that cannot be trained or judged."""
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return {
        "status": "failed",
        "reason": f"{name}{error}",
        "accuracy": None,
        "scores": {},
        "surface": {},
        "best_epoch": 0,
        "seconds": round(seconds, 3),
    }


def trial(method: MethodConfig, shared: Shared, on_head: OnHead | None = None) -> Record:
    """Train one head (seed 0) and search every score's parameters on validation data.

    Args:
        method: the setting.
        shared: what it works on.
        on_head: called after each epoch with the epoch's number and the head as it is then.
    """
    start = time.perf_counter()
    trained = train_in_process(
        TrainingJob(method, seed=0), shared.data, shared.load_backbone(), on_head=on_head
    )
    return judged(
        trained.predictor,
        method,
        shared,
        best_epoch=trained.best_epoch,
        seconds=time.perf_counter() - start,
    )


def judged(
    predictor: Predictor, method: MethodConfig, shared: Shared, *, best_epoch: int, seconds: float
) -> Record:
    """The record of a trained head: its accuracy, and the best of every score's settings."""
    start = time.perf_counter()
    similarities = _similarities(predictor, shared)
    found = _searched(predictor, method, shared, similarities)
    scores: dict[str, Any] = {}
    for score in shared.scores:
        if score in found:
            chosen = posthoc.best(found[score])
            scores[score] = {
                "params": dict(chosen.params),
                "auroc": chosen.auroc,
                "fpr": chosen.fpr,
                "tried": len(found[score]),
            }
    right = predictor.predicted(similarities.validation) == shared.validation.labels
    return {
        "status": "done",
        "reason": None,
        "accuracy": float(right.mean()),
        "scores": scores,
        "surface": {s: _columns(found[s]) for s in shared.scores if len(found.get(s, ())) > 1},
        "best_epoch": best_epoch,
        "seconds": round(seconds + time.perf_counter() - start, 3),
    }


def own_figures(predictor: Predictor, score: str, shared: Shared) -> dict[str, float]:
    """Accuracy, and AUROC and FPR of one score's best setting: what early stopping looks at."""
    similarities = _similarities(predictor, shared)
    best = posthoc.best(_plain(score, predictor, shared, similarities))
    right = predictor.predicted(similarities.validation) == shared.validation.labels
    return {"accuracy": float(right.mean()), "auroc": best.auroc, "fpr": best.fpr}


@dataclass(frozen=True)
class _Similarities:
    """(N, K) of the validation images and of each set that stands for the unknown."""

    validation: NDArray[np.float32]
    ood: Mapping[str, NDArray[np.float32]]


def _similarities(predictor: Predictor, shared: Shared) -> _Similarities:
    validation, *others = (
        predictor.similarity(s.features, shared.local.get(s.name))
        for s in (shared.validation, *shared.ood.values())
    )
    return _Similarities(validation, dict(zip(shared.ood, others, strict=True)))


def _searched(
    predictor: Predictor, method: MethodConfig, shared: Shared, similarities: _Similarities
) -> dict[str, list[posthoc.Setting]]:
    """Every setting of every score, and of the parts of sums."""
    found = {
        score: _plain(score, predictor, shared, similarities)
        for score in scoring.with_parts(shared.scores)
        if score in posthoc.USABLE
    }
    # Without OOD images these would have to be fitted anew for each held-out class.
    if not shared.ood:
        return found
    sets = (shared.validation, *shared.ood.values())
    found |= comparing_search.search(
        shared.scores, predictor, sets, shared.local, shared.records, shared.posthoc
    )
    if shared.fit_data is not None:
        found |= fitted_search.search(
            shared.scores,
            found,
            fitted_search.Context(
                predictor, method, shared.methods, shared.fit_data, shared.storage
            ),
            {s.name: s.features for s in sets},
            shared.posthoc,
            shared.local,
        )
    return found


def _plain(
    score: str, predictor: Predictor, shared: Shared, similarities: _Similarities
) -> list[posthoc.Setting]:
    """Every setting of a score of similarities."""
    scale, known = predictor.logit_scale, similarities.validation
    if similarities.ood:
        return posthoc.search(score, known, similarities.ood, scale, shared.posthoc)
    return posthoc.search_held_out_classes(
        score, known, shared.validation.labels, scale, shared.posthoc
    )


def _columns(found: Sequence[posthoc.Setting]) -> dict[str, Any]:
    """A score's settings as columns, one entry a setting."""
    names = list(found[0].params)
    return {
        "params": {name: [setting.params[name] for setting in found] for name in names},
        "auroc": [setting.auroc for setting in found],
        "fpr": [setting.fpr for setting in found],
    }
