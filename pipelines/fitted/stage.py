"""Fitted scores in a run: which are fitted when, and what of their trainings is logged.

The sweep needs the energy models of seed 0 to judge them; they are trained before its trials, so
that no two trials train the same. The finetune stage fits what the chosen heads of all seeds
need, and its manifest names the records, by method and seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.finetune.cache import load_predictor
from pipelines.fitted import fit
from pipelines.fitted import plan as fit_plan
from pipelines.fitted.fit import HeadToFit, Mode, Progress
from pipelines.fitted.plan import FitData, ScoreFit
from pipelines.fitted.result import EnergyModelHistory
from pipelines.methods import MethodConfig
from pipelines.score import by_name as scoring
from pipelines.score import cache as fitted_records
from pipelines.store.tracker import Tracker

# By record name: what was fitted for a head, and its address.
FittedOfHead: TypeAlias = dict[str, tuple[ScoreFit, str]]
Fitted: TypeAlias = list[FittedOfHead]


@dataclass(frozen=True)
class FitStage:
    """What fitting in a run works with.

    Attributes:
        methods: of the run, as configured, by name.
        scores: that judge every head.
        data: what is fitted to.
        storage: where heads and records are kept.
        compute: Ray Train's workers.
        mode: with Ray Train, or in this process.
        on_progress: called with (epochs done, in all, a note).
    """

    methods: Mapping[str, MethodConfig]
    scores: Sequence[str]
    data: FitData
    storage: Storage
    compute: ComputeConfig
    mode: Mode
    on_progress: Progress

    def prepare(self, searched: Iterable[str]) -> None:
        """Train, for the sweep, the energy models that methods not `searched` are judged by.

        A method whose settings are searched trains energy models of its own in its trials.
        """
        if not set(self.methods) - set(searched):
            return
        names = [name for name in scoring.with_parts(self.scores) if name in scoring.TRAINED]
        settings = {name: fit_plan.settings_of(name, self.methods.values()) for name in names}
        fit.run(
            [ScoreFit(name, {}, density) for name, density in settings.items()],
            self.data,
            self.storage,
            compute=self.compute,
            mode=self.mode,
            on_progress=self.on_progress,
        )

    def fit_heads(self, heads: Sequence[HeadToFit]) -> Fitted:
        """Fit what every head's scores need.

        Raises:
            UserError: where a score applies to no head.
        """
        fitting = [self._applying(head) for head in heads]
        for name in self.scores:
            if not any(name in head.scores for head in fitting):
                raise UserError(
                    f"score {name}: it reads {' and '.join(sorted(scoring.reads(name)))}, which no "
                    "head of this run gives"
                )
        return fit.run_for_heads(
            fitting,
            self.methods,
            self.data,
            self.storage,
            compute=self.compute,
            mode=self.mode,
            on_progress=self.on_progress,
        )

    def _applying(self, head: HeadToFit) -> HeadToFit:
        """The head with those of its scores that it can be judged by."""
        predictor = load_predictor(self.storage, head.address)
        kept = {n: p for n, p in head.scores.items() if scoring.applies(n, predictor.head)}
        return replace(head, scores=kept)


def histories(fitted: Fitted, storage: Storage) -> tuple[EnergyModelHistory, ...]:
    """How every energy-based model of these heads was trained, each model once."""
    models = {
        address: training
        for records in fitted
        for training, address in records.values()
        if training.score in scoring.TRAINED
    }
    histories = []
    for address, training in models.items():
        manifest = fitted_records.read_manifest(storage, address)
        histories.append(
            EnergyModelHistory(
                score=training.score,
                seed=training.seed,
                address=address,
                settings=manifest.settings,
                seconds=manifest.seconds,
                history=manifest.history,
            )
        )
    return tuple(histories)


def log(trainings: Sequence[EnergyModelHistory], tracker: Tracker, parent: str) -> None:
    """Each training as a separate MLflow run: its settings, and every epoch's figures."""
    for training in trainings:
        name = f"fit {training.score} seed {training.seed}"
        with tracker.run(name, parent=parent) as active:
            about = {"score": training.score, "seed": training.seed, "address": training.address}
            active.log_params({**about, **training.settings})
            for report in training.history:
                figures = {key: value for key, value in report.items() if key != "epoch"}
                active.log_metrics(figures, step=int(report["epoch"]))
