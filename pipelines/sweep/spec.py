"""What a trial is asked for, and its address: the setting, what it works on, the code.

A trial's address changes with what can change its record and with nothing else: with the training,
the head, the losses, the scores that are judged, the metrics; not with how settings are proposed
(`pipelines.sweep.space`), nor with a plug-in that the trial does not use. A method's selection
criterion (`score`) and its `score_params` train nothing, so they are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.backbones import network as backbones
from pipelines.code_digest import ROOT, Code, code_of
from pipelines.config import UserError, digest, plain
from pipelines.data.feature_sets import FeatureSets
from pipelines.fitted import search as fitted_search
from pipelines.heads import HEADS
from pipelines.methods import METHODS, MethodConfig, training_setting
from pipelines.records import SetName
from pipelines.score import by_name as scoring
from pipelines.score.code import score_rows_used
from pipelines.sweep import space as search_space
from pipelines.sweep import trial as sweep_trial
from pipelines.sweep.result import Settings
from pipelines.sweep.trial import Shared


@dataclass(frozen=True)
class Spec:
    """The specification of one trial.

    Attributes:
        method: its name in tables.
        settings: the values that are tried, by dotted key.
        config: the method with those values; the method as it was where they are refused.
        address: where the record lies below `cache/trials/`.
        problem: why the method refuses the values, or None.
    """

    method: str
    settings: Settings
    config: MethodConfig
    address: str
    problem: str | None = None

    @property
    def criterion(self) -> str:
        """The score that the method is chosen by."""
        return self.config.score


@dataclass(frozen=True)
class MakeSpec:
    """Turns values into the specification of a method's trial; runs in workers too.

    Attributes:
        name: the method's, in tables.
        method: what the values are laid over.
        scores: names of those that are judged.
        inputs: digest of what decides a trial's record besides its setting and the code.
    """

    name: str
    method: MethodConfig
    scores: tuple[str, ...]
    inputs: str

    def __call__(self, values: Mapping[str, object]) -> Spec:
        """A setting's specification; one that the method refuses has its `problem` in it.

        Raises:
            UserError: for a key that the method does not have: a typing error is no failed trial.
        """
        settings: Settings = dict(values)  # type: ignore[arg-type]
        for key in settings:
            search_space.check_key(self.method, key, self.name)
        try:
            config = search_space.with_values(self.method, settings)
        except UserError as error:
            address = digest([self.name, plain(self.method), settings, str(error)])
            return Spec(self.name, settings, self.method, address, str(error))
        return Spec(self.name, settings, config, self._address(config))

    def _address(self, config: MethodConfig) -> str:
        code = trial_code(config, self.scores).digest
        return digest([training_setting(config), code, self.inputs])


def inputs_digest(shared: Shared, sets: FeatureSets) -> str:
    """A digest of what decides a trial's record besides its setting and the code."""
    opened = [name for name in sets.benchmark.sets if SetName.parse(name).trains]
    words = {n: scoring.to_bytes(record) for n, record in shared.records.items()}
    return digest(
        {
            "data": sets.address(opened),
            "judged_on": shared.judged_on,
            "backbone": dict(backbones.identity(shared.backbone)),
            "posthoc": plain(shared.posthoc),
            "scores": list(shared.scores),
            "densities": fitted_search.densities(shared.scores, shared.methods),
            "records": {name: hashlib.sha256(data).hexdigest() for name, data in words.items()},
        }
    )


def trial_code(method: MethodConfig, scores: Sequence[str], *, root: Path = ROOT) -> Code:
    """The code that decides the record of a trial of `method`, judged by `scores`.

    Args:
        method: whose losses and head are trained.
        scores: names of those that are judged, sums among them.
        root: the folder that holds the project's packages.
    """
    further = sweep_trial.further_searches(scores)
    trained = [part for part in scoring.with_parts(scores) if part in scoring.TRAINED]
    return code_of(
        sweep_trial.attempt,
        sweep_trial.trial,
        sweep_trial.trials_together,
        METHODS[method.name].Config.__module__,
        HEADS[method.head.name].Config.__module__,
        *score_rows_used(scores),
        *(METHODS[score].Config for score in trained),
        *(sweep_trial.FURTHER_SEARCHES[name] for name in further),
        root=root,
    )
