"""What methods share: their settings, and what a loss is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, TypeAlias, TypeVar

import torch.nn.functional as F
from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from pipelines.backbones.network_training import NetworkTraining
from pipelines.config import Section, plain
from pipelines.heads import HEADS, AnyHead

# (losses by name, whose sum is minimised; figures to report)
Losses: TypeAlias = tuple[dict[str, Tensor], dict[str, float]]


# Settings of a method that no training depends on: its selection criterion and what scores take.
NOT_TRAINED = ("score", "score_params")


class TrainingConfig(Section):
    """How a head is trained, whatever its losses."""

    epochs: int = Field(30, ge=1, description="passes over the training images")
    batch_size: int = Field(32, ge=1, description="images a step; the last batch may be shorter")
    outlier_batch_size: int | None = Field(
        None,
        ge=1,
        description="outliers a step of a method that learns from them; none: 2 x images",
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="sgd with momentum, Adam or AdamW"
    )
    lr: float = Field(2e-3, gt=0, description="learning rate after warm-up")
    schedule: Literal["cosine", "steps"] = Field(
        "cosine", description="of the learning rate after warm-up; steps: x 0.1 at each milestone"
    )
    milestones: tuple[float, ...] = Field(
        (0.5, 0.75), description="of schedule=steps: shares of the updates after warm-up"
    )
    final_lr: float = Field(0.0, ge=0, description="where the cosine ends, at the last step")
    warmup_epochs: int = Field(1, ge=0, description="epochs at warmup_lr before the cosine")
    warmup_lr: float = Field(1e-5, gt=0, description="constant learning rate of the warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="decoupled for adamw")
    accumulate: int = Field(1, ge=1, description="parts of a batch whose gradients are added up")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast")
    threads: int = Field(1, ge=1, description="CPU threads of a worker; part of the last bits")

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0 and self.epochs > 1:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}"
            )
        if list(self.milestones) != sorted({m for m in self.milestones if 0 < m < 1}):
            raise ValueError(f"milestones={list(self.milestones)}: give shares in (0, 1), rising")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true needs momentum > 0")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate} > batch_size={self.batch_size}")
        return self


class MethodConfig(Section):
    """A method's settings; `name` tells which file in `pipelines/methods/` it belongs to."""

    name: str
    head: AnyHead
    score: str = Field(description="the selection criterion")
    adjust_logits: float = Field(
        0.0, ge=0, description="predicted class from f - this x log(share of the class in training)"
    )
    score_params: dict[str, dict[str, int | float]] = Field(
        {},
        description="by score: its parameters where nothing is searched; what is left out keeps "
        "the score's default. Training does not see it",
    )
    training: TrainingConfig = TrainingConfig()

    needs_outliers: ClassVar[bool] = False
    needs_outlier_counts: ClassVar[bool] = False
    needs_text_features: ClassVar[bool] = False
    needs_trainable_head: ClassVar[bool] = True
    # Whether its losses are those of a whole network too: they read logits and features alone.
    trains_networks: ClassVar[bool] = False
    # Whether they read what only the loop of networks gives.
    needs_network: ClassVar[bool] = False
    # Differently augmented copies of each image that a network sees.
    num_views: ClassVar[int] = 1
    # Length of the projection that a network is given for training alone; 0: none.
    projection_dim: ClassVar[int] = 0
    # Whether `prepare` reads what the backbone gives for training images and outliers.
    prepares_from_logits: ClassVar[bool] = True
    # Arrays with a row for each training image that the loss reads, in `Batch.columns`:
    # `local_features` (N, P, D), `domains` (N,).
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def network(self) -> NetworkTraining | None:
        """How it trains a whole network from pixels; None: it trains a head on features."""
        return self.head.network

    @property
    def num_stages(self) -> int:
        """Stages of a head's training, of `training.epochs` and a schedule of rates each.

        With more than one, a stage begins at the best epoch of the one before and with a new
        optimiser, and the head's `enter_stage(stage, begins)` says what learns in it.
        """
        return 1

    @property
    def num_epochs(self) -> int:
        """Epochs of all stages."""
        return self.training.epochs * self.num_stages

    @property
    def inner_steps(self) -> int:
        """Updates by `MethodPlugin.inner_loss` before each update by `loss`, on its batch."""
        return 0

    @model_validator(mode="after")
    def _check_head(self) -> MethodConfig:
        head = self.head
        if self.needs_text_features and not head.has_text_features:
            fitting = [n for n, h in HEADS.items() if h.Config.has_text_features]
            raise ValueError(
                f"head={head.name} has no text features, which the losses of {self.name} compare "
                f"images with; allowed: {', '.join(fitting)}"
            )
        if self.needs_trainable_head and not head.trainable and head.network is None:
            fitting = [n for n, h in HEADS.items() if h.Config.trainable]
            raise ValueError(
                f"head={head.name} has nothing to train; allowed: {', '.join(fitting)}, or "
                "classifier with head.train={start: backbone}, which trains the whole network"
            )
        if head.network is not None and not self.trains_networks:
            raise ValueError(f"head.train: method {self.name} trains no network")
        if head.network is None and self.needs_network:
            raise ValueError(
                f"head={head.name}: method {self.name} trains a whole network from pixels: "
                "head={name: classifier, train: {start: backbone}}"
            )
        return self

    @model_validator(mode="after")
    def _check_outliers(self) -> MethodConfig:
        size = self.training.outlier_batch_size
        if size is not None and not self.needs_outliers:
            raise ValueError(
                f"training.outlier_batch_size={size}: method {self.name} learns from no outliers; "
                "leave it out, or choose a method that does"
            )
        return self


def training_setting(method: MethodConfig) -> dict[str, JsonValue]:
    """What decides a trained head of the method's settings, for addresses of caches."""
    return {key: value for key, value in plain(method).items() if key not in NOT_TRAINED}


@dataclass(frozen=True)
class Batch:
    """The data of one step.

    Attributes:
        labels: (N,) classes of the training images.
        columns: further per-image tensors of the training images (domains, local features).
        prepared: what the method's `prepare` measured before training (margins, a prior).
        seed: of what a loss draws at this step.
    """

    labels: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Initial:
    """What the backbone makes of the training data before training: by prompts, or its own layer.

    Attributes:
        logits: (N, K) of the training images.
        outlier_logits: (M, K) of the outliers, or None.
        outlier_counts: (K,) how many outliers are predicted as each class, where a pass over
            all of them has been made beforehand (they may be more than the M held here).
        labels: (N,) of the training images.
    """

    logits: Tensor
    outlier_logits: Tensor | None
    outlier_counts: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """What the head made of one step's images, and of its outliers where there are any.

    Attributes:
        similarity: (N, K); logits: (N, K) similarity x logit_scale.
        image_features: (N, D) after any adapter; text_features: (K, D) or None.
        outlier_similarity, outlier_logits: (M, K) or None.
        logit_scale: the head's.
        extra: what else the head gave.
        rows: what else the head gave with one row an image, of the N images.
        view_logits: (N, V, K) of V views of each image, `logits` being the first; of a network
            that is trained by a method with several views.
        projections: (N, V, P) and outlier_projections: (M, P), unit length; of a network that is
            trained by a method with a projection.
    """

    similarity: Tensor
    logits: Tensor
    image_features: Tensor
    text_features: Tensor | None
    outlier_similarity: Tensor | None
    outlier_logits: Tensor | None
    logit_scale: float
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    view_logits: Tensor | None = None
    projections: Tensor | None = None
    outlier_projections: Tensor | None = None


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


@dataclass(frozen=True)
class MethodPlugin(Generic[ConfigT]):
    """The record of a method: what its file gives.

    Attributes:
        Config: the method's settings.
        loss: (outputs, batch, config) to losses by name, whose sum is minimised, and figures to
            report.
        prepare: (config, initial) to tensors by name, measured once before training from what the
            backbone itself gives; losses find them in `Batch.prepared`. None: nothing is.
        inner_loss: as `loss`, of the `Config.inner_steps` updates of a head before each update by
            `loss`. None: there are none.
    """

    Config: type[ConfigT]
    loss: Callable[[Outputs, Batch, ConfigT], Losses]
    prepare: Callable[[ConfigT, Initial], dict[str, Tensor]] | None = None
    inner_loss: Callable[[Outputs, Batch, ConfigT], Losses] | None = None


def cross_entropy(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean cross-entropy of the logits (nats)."""
    return F.cross_entropy(outputs.logits.float(), batch.labels)


def outlier_logits(outputs: Outputs) -> Tensor:
    """The step's outlier logits (M, K), float32; the method's config promised that there are."""
    assert outputs.outlier_logits is not None
    return outputs.outlier_logits.float()


def accuracy(outputs: Outputs, batch: Batch) -> float:
    """Share of the batch whose largest logit is its class's."""
    return float((outputs.logits.argmax(dim=1) == batch.labels).float().mean())
