"""A feature space: the methods that are judged on the features of one backbone.

Heads on a frozen backbone share its space. A network that a method trained has a space of its own,
in which its own last layer is judged like any other classifier's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipelines.backbones.description import BackboneConfig
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.features import FeatureCache
from pipelines.data.storage import Storage
from pipelines.embed.result import EmbeddedSource
from pipelines.fitted import fit, layer_features
from pipelines.fitted import negative_words as negative_classes
from pipelines.fitted.negative_words import read_words
from pipelines.fitted.plan import FitData
from pipelines.fitted.stage import FitStage
from pipelines.heads.base import LOCAL
from pipelines.methods import METHODS, MethodConfig
from pipelines.records import HeadKey
from pipelines.score import by_name as scoring

if TYPE_CHECKING:
    from pipelines.run import Run


def judged(method: MethodConfig) -> MethodConfig:
    """A method as its result is judged: a network that it trains, by the network's own layer."""
    if method.network is None:
        return method
    config: MethodConfig = METHODS["classifier"].Config(
        score=method.score,
        score_params=method.score_params,
        adjust_logits=method.adjust_logits,
    )
    return config


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """The methods that are judged on one backbone's features.

    Attributes:
        run: that it belongs to.
        backbone: resolved.
        methods: as they are judged, by name.
        seeds: of these methods, in this space.
        sources: the features of the benchmark's sources.
    """

    run: Run
    backbone: BackboneConfig
    methods: Mapping[str, MethodConfig]
    seeds: tuple[int, ...]
    sources: Mapping[str, EmbeddedSource]

    @property
    def keys(self) -> list[HeadKey]:
        """The heads of this space, method by method."""
        return [HeadKey(method=name, seed=seed) for name in self.methods for seed in self.seeds]

    @property
    def storage(self) -> Storage:
        """Where everything is kept."""
        return self.run.storage

    @property
    def caches(self) -> dict[str, FeatureCache]:
        """The features by source."""
        return {name: FeatureCache(self.storage, s.address) for name, s in self.sources.items()}

    @cached_property
    def sets(self) -> FeatureSets:
        """The embedded sets."""
        views = {name: s.views for name, s in self.sources.items() if s.views is not None}
        return FeatureSets(
            self.run.benchmark,
            self.caches,
            views={name: FeatureCache(self.storage, address) for name, address in views.items()},
        )

    @property
    def scores(self) -> list[str]:
        """Those of the run's scores that a method of this space can be judged by."""
        heads = {method.head.name for method in self.methods.values()}
        return [n for n in self.run.config.scores if any(scoring.applies(n, h) for h in heads)]

    @cached_property
    def fit_data(self) -> FitData | None:
        """What scores are fitted to, where there is one that is."""
        config, observer = self.run.config, self.run.observer
        if not scoring.any_fitted(self.scores):
            return None
        local = any(LOCAL in m.head.columns for m in self.methods.values())
        data = fit.load_data(self.sets, self.storage, mode=config.training, local=local)
        if not scoring.reads_layers(self.scores):
            return data
        return layer_features.added(
            data,
            self.run.benchmark,
            self.backbone,
            self.storage,
            settings=config.embed,
            compute=config.compute,
            on_progress=lambda done, total, _: observer.progress(done, total, "images, layers"),
        )

    @cached_property
    def mined(self) -> dict[str, str]:
        """The address of the words by the name of their record, where a score reads them."""
        if not scoring.reads_words(self.scores):
            return {}
        config, class_names = self.run.config, self.run.benchmark.class_names
        address = negative_classes.keep(
            read_words(config.negative_classes, config.negative_pool, class_names),
            class_names,
            self.run.benchmark.templates,
            self.backbone,
            self.storage,
        )
        return {scoring.NEG_LABEL: address}

    @property
    def fit_stage(self) -> FitStage | None:
        """What fits scores, where there is one to fit."""
        if self.fit_data is None:
            return None
        return FitStage(
            methods=self.methods,
            scores=self.scores,
            data=self.fit_data,
            storage=self.storage,
            compute=self.run.config.compute,
            mode=self.run.config.training,
            on_progress=self.run.observer.progress,
        )
