"""One run: its resolved configuration, its name, and what its stages have written so far.

RUN is a digest of the resolved configuration, the images and the backbone's weights; everything
lies below `runs/RUN/`. What a stage gave is its record; beside it, in `runs/RUN/stamps/`, stands
what it came from: its code, the records of the stages before, and digests of the record and of the
stage's other files. A stage is done where its stamp is still true and what its record names in the
cache is there, and otherwise repeated with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.code_digest import Code, is_unchanged
from pipelines.compute.stamp import stamp
from pipelines.config import UserError, digest, plain, to_yaml
from pipelines.data import kept
from pipelines.data.benchmarks import Benchmark
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.kept import Damaged, Entry
from pipelines.data.storage import Storage
from pipelines.embed.result import EmbedResult
from pipelines.evaluate.metrics import Metrics
from pipelines.finetune.cache import entry as head_entry
from pipelines.fitted.negative_words import read_words
from pipelines.fitted.result import FinetuneResult
from pipelines.methods import MethodConfig
from pipelines.records import HeadKey, StoredRecord
from pipelines.register import stage as register
from pipelines.register.result import RegisterResult
from pipelines.run.observer import Observer, backbone_training
from pipelines.run.record import MlflowRun, StageStamp
from pipelines.run.space import FeatureSpace, judged
from pipelines.score import by_name as scoring
from pipelines.score.cache import entry as fitted_entry
from pipelines.score.result import ScoreResult
from pipelines.score.stage import entry as table_entry
from pipelines.settings.config import (
    NOT_CONTENT,
    PipelineConfig,
    flat_params,
    open_checked,
    with_local_features,
)
from pipelines.store import registry
from pipelines.store import tracker as tracking
from pipelines.store.database import RegisteredVersion
from pipelines.store.locks import locked
from pipelines.sweep.result import SweepResult
from pipelines.sweep.train_result import TrainResult
from pipelines.train.cache import entry as network_entry
from pipelines.train.cache import trained_backbone
from pipelines.train.result import NetworkRef

# The file of a stage's record where it is not called after the stage.
RECORDS = {"evaluate": "metrics.json"}
# What a stage writes into the run's folder beside its record: files, and folders of files.
BESIDE = {
    "embed": ("train.parquet",),
    "sweep": ("surfaces.parquet", "best", "sweep"),
    "evaluate": ("report.html",),
}
RecordT = TypeVar("RecordT", bound=StoredRecord)


@dataclass(frozen=True)
class Run:
    """One resolved configuration and what it has produced so far.

    Attributes:
        config: with every value given.
        storage: where everything is kept.
        benchmark: its images by set.
        backbone: that all methods without one of their own work on, resolved.
        id: its name.
        observer: is told what happens.
        own_backbones: that methods train in place of the run's, resolved, by method.
    """

    config: PipelineConfig
    storage: Storage
    benchmark: Benchmark
    backbone: BackboneConfig
    id: str
    observer: Observer
    own_backbones: Mapping[str, BackboneConfig] = field(default_factory=dict)

    @classmethod
    def open(cls, config: PipelineConfig, observer: Observer) -> Run:
        """Look at the images and the backbone (training `mini` if need be) and name the run."""
        config = with_local_features(config)
        storage = Storage.open(config.storage)
        benchmark = open_checked(config)
        with locked(storage, "backbone", "another process makes the backbone ready: waiting"):
            backbone = network.resolve(
                config.backbone,
                storage,
                backbone_training(observer),
                device=config.compute.embed_device,
            )
            trained = {n: m.network for n, m in config.methods.items() if m.network is not None}
            own = {
                n: network.resolve(t.backbone, storage) for n, t in trained.items() if t.backbone
            }
        content = {k: v for k, v in plain(config).items() if k not in NOT_CONTENT}
        identity = dict(network.identity(backbone))
        if scoring.reads_words(config.scores):
            words = read_words(config.negative_classes, config.negative_pool, benchmark.class_names)
            identity["words"] = digest([kind.what for kind in words])
        identity |= {f"of {name}": digest(network.identity(other)) for name, other in own.items()}
        run_id = digest([content, benchmark.address, identity], length=12)
        run = cls(config, storage, benchmark, backbone, run_id, observer, own)
        run.storage.write_bytes(to_yaml(config).encode(), "runs", run_id, "config.yaml")
        return run

    def _record(self, stage: str, kind: type[RecordT]) -> RecordT:
        """What a stage wrote, which its stamp says it did.

        Raises:
            UserError: where it has not run yet.
            Damaged: where its file is not as it was written.
        """
        place, stamp = self.place(stage), self._stamp(stage)
        if not (self.storage.exists(*place) and self.storage.exists(*stamp)):
            raise UserError(
                f"run {self.id} has no {stage} yet: run python -m jobs.{stage} (or "
                "jobs.pipeline) with the same words first"
            )
        written = kept.read_record(self.storage, StageStamp, *stamp).output
        content = self.storage.read_bytes(*place)
        if hashlib.sha256(content).hexdigest() != written:
            raise Damaged(self.storage.path(*place), "not as it was written", [stamp])
        return kind.from_json(content, self.storage.path(*place))

    @property
    def embedded(self) -> EmbedResult:
        """What embed wrote."""
        return self._record("embed", EmbedResult)

    @property
    def swept(self) -> SweepResult:
        """What the sweep chose."""
        return self._record("sweep", SweepResult)

    @property
    def finetuned(self) -> FinetuneResult:
        """The trained heads."""
        return self._record("finetune", FinetuneResult)

    @property
    def scored(self) -> ScoreResult:
        """The tables of scores."""
        return self._record("score", ScoreResult)

    @property
    def metrics(self) -> Metrics:
        """Every figure of the run."""
        return self._record("evaluate", Metrics)

    @property
    def registered(self) -> RegisterResult:
        """The version in the model registry."""
        return self._record("register", RegisterResult)

    @property
    def champion(self) -> RegisterResult:
        """The version that the registry's alias points to now, as the registry describes it.

        Raises:
            UserError: where there is none.
        """
        found = self._version()
        now = None if found is None else register.described(self.registered, found)
        if now is None:
            raise UserError(f"{self.registered.uri} is gone: the same command registers it again")
        return now

    @property
    def reason_to_register(self) -> str | None:
        """Why the model has to be registered again; None where the registry has it as it was."""
        return register.reason_to_register(self.registered, self._version(), self.store_uri)

    def _version(self) -> RegisteredVersion | None:
        wanted = self.config.register_as
        return registry.version_of(
            self.storage, self.config.tracking_uri, wanted.name, f"@{wanted.alias}"
        )

    def place(self, stage: str) -> tuple[str, ...]:
        """Where a stage's record lies."""
        return "runs", self.id, RECORDS.get(stage, f"{stage}.json")

    def has(self, stage: str) -> bool:
        """Whether a stage has written its record."""
        return self.storage.exists(*self.place(stage))

    def finish(self, stage: str, record: bytes, code: Code, before: Sequence[str]) -> None:
        """Write what a stage gave, and then its stamp.

        Args:
            stage: its name.
            record: the content of its file.
            code: that decided it.
            before: the stages that it reads.
        """
        self.storage.write_bytes(record, *self.place(stage))
        stamp = StageStamp(
            code=code.parts,
            files=dict(code.files),
            inputs={name: self._digest(name) for name in before},
            output=hashlib.sha256(record).hexdigest(),
            beside=self._beside(stage),
        )
        kept.write_record(self.storage, stamp, *self._stamp(stage))

    def reason_to_run(
        self, stage: str, code: Callable[[], Code], before: Sequence[str]
    ) -> str | None:
        """Why a stage has to run, in words ("" where it never has); None where it is done."""
        if not self.storage.exists(*self._stamp(stage)):
            return ""
        try:
            stamp = kept.read_record(self.storage, StageStamp, *self._stamp(stage))
        except Damaged:
            return "its stamp is not as it was written"
        is_same = is_unchanged(stamp.code, stamp.files)
        if not is_same and (changed := code().changes(stamp.code)):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return f"code changed: {', '.join(changed[:3])}{more}"
        if others := [n for n in before if stamp.inputs.get(n) != self._digest(n)]:
            return f"{', '.join(others)} gave something else"
        if self._digest(stage) != stamp.output:
            return f"{self.place(stage)[-1]} is missing or not as it was written"
        now = self._beside(stage)
        others = [name for name, digest in stamp.beside.items() if now.get(name) != digest]
        if others:
            return f"{others[0]} is missing or not as it was written"
        lost = [path for entry in self._entries(stage) for path in entry.lost()]
        return f"{lost[0]} is missing or not as it was written" if lost else None

    def _entries(self, stage: str) -> list[Entry[Any]]:
        """What a stage's record names in the cache."""
        if stage == "embed":
            return [cache.entry for space in self.spaces for cache in space.caches.values()]
        if stage == "train":
            return [network_entry(self.storage, n.address) for n in self.trained.networks]
        if stage == "finetune":
            heads = self.finetuned.heads
            fitted = {address for head in heads for address in head.fitted.values()}
            trained = {head.address for head in heads}
            return [
                *(head_entry(self.storage, address) for address in sorted(trained)),
                *(fitted_entry(self.storage, address) for address in sorted(fitted)),
            ]
        if stage == "score":
            places = sorted({head.address for head in self.scored.heads})
            return [table_entry(self.storage, place) for place in places]
        return []

    def mended(self, damaged: Damaged) -> Run:
        """The same run without what is damaged: the stage that made it is to be repeated."""
        kept.discard(self.storage, damaged)
        return replace(self)  # what it has in memory may rest on it

    def _beside(self, stage: str) -> dict[str, str]:
        """The digests of what a stage wrote into the run's folder beside its record, by path."""
        found = {}
        for name in BESIDE.get(stage, ()):
            names = [f"{name}/{inner}" for inner in self.storage.names("runs", self.id, name)]
            if not names and self.storage.exists("runs", self.id, name):
                names = [name]
            for path in names:
                place = ("runs", self.id, *path.split("/"))
                found[path] = self.storage.size_and_sha256(*place)[1]
        return found

    def _stamp(self, stage: str) -> tuple[str, ...]:
        return "runs", self.id, "stamps", f"{stage}.json"

    def _digest(self, stage: str) -> str:
        """The digest of a stage's record as it is now; empty where there is none."""
        place = self.place(stage)
        if not self.storage.exists(*place):
            return ""
        return hashlib.sha256(self.storage.read_bytes(*place)).hexdigest()

    @property
    def trained(self) -> TrainResult:
        """The networks that methods trained; none where no method trains one."""
        return self._record("train", TrainResult) if self.trains else TrainResult()

    @property
    def trains(self) -> bool:
        """Whether a method trains a whole network."""
        return any(method.network is not None for method in self.config.methods.values())

    @cached_property
    def settings(self) -> dict[str, MethodConfig]:
        """The methods by name; those whose networks were searched with the chosen setting."""
        swept = self.trained.swept
        chosen = {} if swept is None else {n: c.setting for n, c in swept.methods.items()}
        return {**self.config.methods, **chosen}

    @cached_property
    def methods(self) -> dict[str, MethodConfig]:
        """The methods as their results are judged, by name."""
        return {name: judged(method) for name, method in self.settings.items()}

    @property
    def frozen(self) -> dict[str, MethodConfig]:
        """The methods that train no network, by name."""
        return {n: m for n, m in self.config.methods.items() if m.network is None}

    def backbone_for(self, method: str) -> BackboneConfig:
        """What a method works on: the backbone of its own, of the one it starts from, the run's."""
        how = self.config.methods[method].network
        if how is not None and how.start in self.config.methods:
            return self.backbone_for(how.start)
        return self.own_backbones.get(method, self.backbone)

    def backbone_of(self, trained: NetworkRef) -> BackboneConfig:
        """A trained network as a backbone."""
        name = f"{trained.key.method}/{trained.key.seed}"
        architecture = self.backbone_for(trained.key.method)
        return trained_backbone(architecture, trained.address, self.storage, name)

    @cached_property
    def spaces(self) -> tuple[FeatureSpace, ...]:
        """The feature spaces: that of the frozen backbone, and one of each trained network."""
        found, seeds = [], tuple(range(self.config.seeds))
        embedded = self.embedded
        if self.frozen:
            sources = embedded.sources
            found.append(FeatureSpace(self, self.backbone, self.frozen, seeds, sources))
        for trained, features in zip(self.trained.networks, embedded.networks, strict=True):
            name = trained.key.method
            methods, backbone = {name: self.methods[name]}, self.backbone_of(trained)
            found.append(
                FeatureSpace(self, backbone, methods, (trained.key.seed,), features.sources)
            )
        return tuple(found)

    @property
    def sets(self) -> FeatureSets:
        """The embedded sets of the first space."""
        return self.spaces[0].sets

    def space_of(self, key: HeadKey) -> FeatureSpace:
        """The feature space in which a head is judged."""
        seeds = key.seed
        return next(s for s in self.spaces if key.method in s.methods and seeds in s.seeds)

    @property
    def store_uri(self) -> str:
        """The address of the MLflow store."""
        return tracking.store_uri(self.storage, self.config.tracking_uri)

    @cached_property
    def tracker(self) -> tracking.Tracker:
        """The MLflow store."""
        return tracking.open_tracker(self.storage, tracking_uri=self.config.tracking_uri)

    @cached_property
    def tracking_run(self) -> str:
        """The MLflow run of this run, the same one after a restart."""
        place = ("runs", self.id, "mlflow.json")
        known = kept.find_record(self.storage, MlflowRun, *place)
        if known is not None and self.tracker.has(known.run_id):  # the store may be another by now
            return known.run_id
        name = f"{self.config.benchmark.name}-{self.config.backbone.name}-{self.id}"
        with self.tracker.run(name, tags=stamp(run=self.id)) as active:
            active.log_params(flat_params(plain(self.config)))
            kept.write_record(self.storage, MlflowRun(run_id=active.run_id), *place)
            return str(active.run_id)
