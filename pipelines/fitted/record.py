"""How one fitted score is made from training features: a closed form, a sum, or a training.

Nothing here knows where records are kept: `pipelines.fitted.fit` looks for them and keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from pipelines.backbones.threads import torch_threads
from pipelines.code_digest import Code, code_of
from pipelines.fitted.class_statistics import OF_STATISTICS
from pipelines.fitted.plan import FitData, ScoreFit
from pipelines.heads import Predictor
from pipelines.heads.parallel import Workers
from pipelines.methods import METHODS
from pipelines.methods.energy_models import EnergyModelConfig
from pipelines.methods.gaussian_mixture import Config as MixtureConfig
from pipelines.ood import FITTED_SCORES, GaussianMixture
from pipelines.ood.energy_training import EnergyTrainer, EpochReport, TrainerState
from pipelines.ood.records import FittedRecord
from pipelines.score import by_name as scoring
from pipelines.score.by_name import Combination, Inputs, Records
from pipelines.score.code import score_rows_used

if TYPE_CHECKING:  # for types alone: the record of a sum without KNN does not depend on its code
    from pipelines.ood.nearest_neighbours import KNN

# The one density that is made of class statistics and not of the features themselves.
MIXTURE = "gaussian_mixture"


def fit_code(score: str) -> Code:
    """The code that can decide the record of a score; a head's code is in the head's address."""
    how: list[Any] = [_closed_form]
    if scoring.is_sum(score):
        how = [_sum]
    elif score in scoring.TRAINED:
        how = [train, METHODS[score].Config, *OF_STATISTICS]
    elif score == MIXTURE:
        how = [_mixture, *OF_STATISTICS]
    return code_of(*how, *score_rows_used([score]), alone=(without_training,))


def without_training(
    fit: ScoreFit, data: FitData, predictor: Predictor | None, records: Records
) -> FittedRecord:
    """The record of a score that needs no training.

    Args:
        fit: what to fit.
        data: what to fit to.
        predictor: the head, where the record reads it.
        records: of a sum's parts, by name.

    Raises:
        ValueError: where the score cannot be fitted to these features.
    """
    if scoring.is_sum(fit.score):
        assert predictor is not None
        return _sum(fit, scoring.inputs_of(predictor, data.features, data.local), records)
    if fit.score == MIXTURE:
        return _mixture(fit, data)
    return _closed_form(fit, data, predictor)


def _closed_form(fit: ScoreFit, data: FitData, predictor: Predictor | None) -> FittedRecord:
    """A density of the features, or of the head's logits on them."""
    arrays: dict[str, Any] = {"features": data.features, "labels": data.labels}
    arrays |= {"layers": data.layers, "layer_sizes": data.layer_sizes}
    if fit.head is not None:
        assert predictor is not None
        inputs = scoring.inputs_of(predictor, data.features, data.local)
        arrays["logits"], arrays["activations"] = inputs.logits, data.features
        if (linear := predictor.plugin.linear) is not None:
            arrays["weight"], arrays["bias"] = linear(predictor)
    row = FITTED_SCORES[fit.score]
    # The size of an input step is no parameter of the record itself.
    params = {k: int(v) if k == "k" else v for k, v in fit.params.items() if k in row.parameters}
    return row.fit(arrays, **params)


def _mixture(fit: ScoreFit, data: FitData) -> GaussianMixture:
    config = fit.density
    assert isinstance(config, MixtureConfig)
    return GaussianMixture.from_statistics(
        data.statistics, T_G=config.T_G, weighted=config.weighted, shrinkage=config.shrinkage
    )


def _sum(fit: ScoreFit, inputs: Inputs, records: Records) -> Combination:
    """Mean and deviation of each part over the whole training set.

    A training feature is its own nearest neighbour, at distance 0; there KNN counts the others.
    """
    if "knn" in records:
        known = cast("KNN", records["knn"])
        others = replace(known, k=min(known.k + 1, len(known.features)))
        records = {**records, "knn": others}
    columns = [
        scoring.score_rows(part, inputs, scoring.part_params(fit.score, part, fit.params), records)
        for part in scoring.parts(fit.score)
    ]
    return Combination.fit(torch.stack(columns, dim=1))


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a training is read and kept after each epoch.

    Attributes:
        load: the state after the last finished epoch, None where there is none.
        save: keeps a state.
    """

    load: Callable[[], TrainerState | None] = lambda: None
    save: Callable[[TrainerState], None] = lambda _: None


@dataclass(frozen=True)
class Place:
    """Where a training runs: its workers, its device, and whom it tells of epochs."""

    workers: Workers = field(default_factory=Workers)
    device: str = "cpu"
    on_epoch: Callable[[EpochReport], None] | None = None


def train(fit: ScoreFit, data: FitData, checkpoint: Checkpoint, place: Place) -> EnergyTrainer:
    """Train an energy model, from its checkpoint where there is one."""
    config = settings(fit)
    features = torch.tensor(data.features, device=place.device)
    with torch_threads(config.threads):
        mixture = config.mixture(data.statistics)
        resolved = config.settings(data.statistics, mixture)
        trainer = EnergyTrainer(features, mixture, resolved, seed=fit.seed, parallel=place.workers)
        if (state := checkpoint.load()) is not None:
            trainer.load(state)
        while len(trainer.history) < resolved.epochs:
            report = trainer.epoch()
            if place.workers.rank == 0:
                checkpoint.save(trainer.state())
            if place.on_epoch is not None:
                place.on_epoch(report)
    return trainer


def settings(fit: ScoreFit) -> EnergyModelConfig:
    """How an energy model is trained."""
    assert isinstance(fit.density, EnergyModelConfig)
    return fit.density
