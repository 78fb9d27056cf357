"""One trial: train a head with one setting, then search every score's parameters on arrays.

What is here decides a trial's record and stands in its address (`pipelines.sweep.spec`). Searches
that only some scores need are rows of `FURTHER_SEARCHES`, so that a trial depends on the fitting
code where a fitted score is judged, and nowhere else.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.tower import Tower
from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSet
from pipelines.data.kept import Damaged
from pipelines.data.storage import Storage
from pipelines.finetune.loop import Trained, TrainingData, TrainingJob, train_in_process
from pipelines.finetune.together import train_together
from pipelines.fitted import search as fitted_search
from pipelines.fitted.plan import FitData
from pipelines.heads import Predictor
from pipelines.methods import MethodConfig
from pipelines.ood.table import Table
from pipelines.score import by_name as scoring
from pipelines.score import comparing_search
from pipelines.score import search as posthoc
from pipelines.score.config import PostHocConfig
from pipelines.score.search import Setting
from pipelines.sweep.result import Detection, JudgedOn, ScoreFigures
from pipelines.sweep.trial_record import Surface, TrialRecord, failed

logger = logging.getLogger(__name__)

# Accuracy, and AUROC and FPR under one score's best setting, of what is being trained.
Follow: TypeAlias = Callable[[str], tuple[float, Detection]]
# Is given an epoch's number, and what judges the epoch by a score.
OnEpoch: TypeAlias = Callable[[int, Follow], None]
# By score, every setting that was judged.
Searched: TypeAlias = dict[str, list[Setting]]


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What a trained head is judged on.

    Attributes:
        validation: ID images.
        ood: what stands for the unknown, by name; empty where classes are held out in turn.
        storage: where fitted records are.
        scores: names.
        posthoc: what is searched of every score.
        fit_data: what scores are fitted to, where there is one that is.
        methods: the run's, by name.
        local: local features (N, P, D) by set name, for heads and scores that read them.
        records: the mined words of neg_label.
    """

    validation: FeatureSet
    ood: Mapping[str, FeatureSet]
    storage: Storage
    scores: tuple[str, ...]
    posthoc: PostHocConfig
    fit_data: FitData | None = None
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    local: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    records: scoring.Records = field(default_factory=dict)

    def sets(self) -> tuple[FeatureSet, ...]:
        """ID validation, then each set that stands for the unknown."""
        return (self.validation, *self.ood.values())


@dataclass(frozen=True, kw_only=True)
class Shared(Judging):
    """What every trial of heads works on; put once into Ray's object store.

    Attributes:
        data: what heads are trained on.
        judged_on: where `ood` comes from.
        backbone: where the text tower is.
    """

    data: TrainingData
    judged_on: JudgedOn
    backbone: BackboneConfig

    def load_backbone(self) -> Tower:
        """The backbone, loaded once in each process."""
        return _loaded(self.backbone.model_dump_json())

    def trial(
        self,
        name: str,  # noqa: ARG002 - of heads the setting says everything
        method: MethodConfig,
        on_epoch: OnEpoch | None = None,
    ) -> TrialRecord:
        """Train and judge one setting of the method of that name."""
        return trial(method, self, on_epoch)

    def needs_worker(self, method: MethodConfig) -> bool:
        """No for a classifier's own layer, judged by its logits: nothing is trained or encoded."""
        encodes, fits = backbones.has_text(self.backbone), scoring.any_fitted(self.scores)
        return encodes or fits or method.head.trainable


@functools.lru_cache(maxsize=2)
def _loaded(backbone: str) -> Tower:
    return backbones.load(BackboneConfig.model_validate_json(backbone))


def attempt(make: Callable[[], TrialRecord]) -> TrialRecord:
    """The record that `make` gives of a setting, or one that says why it failed.

    What the machine does to a worker (killed, out of memory, a storage that is gone or damaged) is
    no property of the setting: it is raised, and the sweep reports it without keeping a record.
    """
    start = time.perf_counter()
    try:
        return make()
    except (OSError, MemoryError, Damaged):
        raise
    except Exception as error:
        if not isinstance(error, UserError):
            logger.warning("a trial failed", exc_info=True)
        return failed(error, time.perf_counter() - start)


def trial(method: MethodConfig, shared: Shared, on_epoch: OnEpoch | None = None) -> TrialRecord:
    """Train one head (seed 0) and search every score's parameters on validation data.

    Args:
        method: the setting.
        shared: what it works on.
        on_epoch: called after each epoch with its number and what judges the head as it is then.
    """
    on_head = None if on_epoch is None else functools.partial(_tell, on_epoch, shared)
    start = time.perf_counter()
    job = TrainingJob(method, seed=0)
    trained = train_in_process(job, shared.data, shared.load_backbone(), on_head=on_head)
    return judged(trained, method, shared, seconds=time.perf_counter() - start)


def _tell(on_epoch: OnEpoch, shared: Shared, epoch: int, head: Predictor) -> None:
    on_epoch(epoch, lambda score: followed(head, score, shared))


def trials_together(methods: Sequence[MethodConfig], shared: Shared) -> Iterator[TrialRecord]:
    """The records of settings of one shape, trained as one batched model, in order."""
    start = time.perf_counter()
    jobs = [TrainingJob(method, seed=0) for method in methods]
    results = train_together(jobs, shared.data, shared.load_backbone()) if jobs else []
    seconds = (time.perf_counter() - start) / max(1, len(jobs))
    for method, result in zip(methods, results, strict=True):
        yield attempt(functools.partial(_judged_result, result, method, shared, seconds))


def _judged_result(
    result: Trained | UserError, method: MethodConfig, shared: Shared, seconds: float
) -> TrialRecord:
    if isinstance(result, UserError):
        raise result
    return judged(result, method, shared, seconds=seconds)


def judged(
    trained: Trained, method: MethodConfig, shared: Judging, *, seconds: float
) -> TrialRecord:
    """The record of a trained head: its accuracy, and the best of every score's settings.

    Args:
        trained: the head.
        method: its setting.
        shared: what it is judged on.
        seconds: that its training took.
    """
    start = time.perf_counter()
    predictor = trained.predictor
    similarities = _similarities(predictor, shared)
    searched = _searched(predictor, method, shared, similarities)
    judged_scores = [score for score in shared.scores if score in searched]
    return TrialRecord(
        status="done",
        accuracy=_accuracy(predictor, shared, similarities),
        scores={score: _figures(searched[score]) for score in judged_scores},
        surface={s: Surface.of(searched[s]) for s in judged_scores if len(searched[s]) > 1},
        best_epoch=trained.best_epoch,
        seconds=round(seconds + time.perf_counter() - start, 3),
    )


def followed(predictor: Predictor, score: str, shared: Judging) -> tuple[float, Detection]:
    """Accuracy, and AUROC and FPR of one score's best setting: what early stopping looks at."""
    similarities = _similarities(predictor, shared)
    best = posthoc.best(_of_similarities(score, predictor, shared, similarities))
    return _accuracy(predictor, shared, similarities), Detection(best.auroc, best.fpr)


@dataclass(frozen=True)
class _Similarities:
    """(N, K) of the validation images and of each set that stands for the unknown."""

    validation: NDArray[np.float32]
    ood: Mapping[str, NDArray[np.float32]]


def _similarities(predictor: Predictor, shared: Judging) -> _Similarities:
    validation, *others = (
        predictor.similarity(s.features, shared.local.get(s.name)) for s in shared.sets()
    )
    return _Similarities(validation, dict(zip(shared.ood, others, strict=True)))


def _accuracy(predictor: Predictor, shared: Judging, similarities: _Similarities) -> float:
    right = predictor.predicted(similarities.validation) == shared.validation.labels
    return float(right.mean())


def _figures(settings: Sequence[Setting]) -> ScoreFigures:
    """The best of a score's settings."""
    best = posthoc.best(settings)
    return ScoreFigures(
        params=dict(best.params), auroc=best.auroc, fpr=best.fpr, tried=len(settings)
    )


def _searched(
    predictor: Predictor, method: MethodConfig, shared: Judging, similarities: _Similarities
) -> Searched:
    """Every setting of every score, and of the parts of sums."""
    searched = {
        score: _of_similarities(score, predictor, shared, similarities)
        for score in posthoc.usable(shared.scores, predictor.head)
    }
    # Without OOD images these would have to be fitted anew for each held-out class.
    for name in further_searches(shared.scores) if shared.ood else ():
        searched |= FURTHER_SEARCHES[name](predictor, method, shared, searched)
    return searched


def _of_similarities(
    score: str, predictor: Predictor, shared: Judging, similarities: _Similarities
) -> list[Setting]:
    """Every setting of a score that reads similarities or logits alone."""
    scale, known = predictor.logit_scale, similarities.validation
    if similarities.ood:
        return posthoc.search(score, known, similarities.ood, scale, shared.posthoc)
    labels, num_classes = shared.validation.labels, len(predictor.class_names)
    return posthoc.search_held_out_classes(score, known, labels, scale, shared.posthoc, num_classes)


def further_searches(scores: Sequence[str]) -> list[str]:
    """The names of the searches that some of the scores need beside that over similarities."""
    comparing = ["comparing"] if set(scores) & set(scoring.COMPARING) else []
    return comparing + (["fitted"] if scoring.any_fitted(scores) else [])


def _search_comparing(
    predictor: Predictor,
    method: MethodConfig,  # noqa: ARG001
    shared: Judging,
    searched: Searched,  # noqa: ARG001
) -> Searched:
    return comparing_search.search(
        shared.scores, predictor, shared.sets(), shared.local, shared.records, shared.posthoc
    )


def _search_fitted(
    predictor: Predictor, method: MethodConfig, shared: Judging, searched: Searched
) -> Searched:
    if shared.fit_data is None:
        return {}
    context = fitted_search.Context(
        predictor, method, shared.methods, shared.fit_data, shared.storage
    )
    features = {s.name: s.features for s in shared.sets()}
    return fitted_search.search(
        shared.scores, searched, context, features, shared.posthoc, shared.local
    )


Search: TypeAlias = Callable[[Predictor, MethodConfig, Judging, Searched], Searched]
FURTHER_SEARCHES: Table[Search] = Table({"comparing": _search_comparing, "fitted": _search_fitted})
