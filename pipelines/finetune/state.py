"""One training run: its state, its batches, what a step's losses are, how an epoch is judged.

The loops that use it are `pipelines.finetune.loop` (one head) and `pipelines.finetune.together`
(several settings of one method at a time).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import UserError
from pipelines.finetune.data import EpochReport, Trained, TrainingData, TrainingJob, columns_of
from pipelines.heads import HEADS, HeadContext, Predictor, build
from pipelines.heads.base import LOCAL
from pipelines.heads.initial import initial_head
from pipelines.heads.models import Backbone
from pipelines.heads.parallel import Workers
from pipelines.methods import METHODS, MethodConfig
from pipelines.methods.base import Batch, Initial, Outputs
from pipelines.methods.optimization import learning_rate, optimizer
from pipelines.ood.energy import adjust_logits
from pipelines.ood.seeds import generator, stream

# Figures by name, added up over steps.
Totals: TypeAlias = dict[str, float]


@dataclass
class TrainingRun:
    """The state of a training run; what changes between epochs is in its checkpoint."""

    method: MethodConfig
    head: Any
    context: HeadContext
    outliers: Tensor | None
    outlier_local: Tensor | None
    validation: tuple[Tensor, Tensor]
    validation_local: Tensor | None
    prepared: Mapping[str, Tensor]
    views: Tensor | None
    workers: Workers
    order: torch.Generator
    outlier_order: torch.Generator
    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer | None
    history: list[EpochReport] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)


def start(job: TrainingJob, data: TrainingData, network: Backbone, workers: Workers) -> TrainingRun:
    """A run before its first epoch: the head as it is drawn, the data on its device."""
    device = network.device
    asked = columns_of(job.method)
    context = HeadContext(
        backbone=network,
        class_names=tuple(data.class_names),
        templates=tuple(data.templates),
        features=torch.tensor(data.features, device=device),
        labels=torch.tensor(data.labels, device=device),
        columns={name: torch.tensor(data.columns[name], device=device) for name in asked},
    )
    torch.manual_seed(stream(job.seed, "layers"))
    head = build(job.method.head, context, stream(job.seed, "head")).to(device)
    if workers.world > 1 and workers.split == "classes":
        head.workers = workers
    parameters = {n: p for n, p in head.named_parameters() if p.requires_grad}
    uses_outliers = job.method.needs_outliers and data.outliers is not None
    outliers = torch.tensor(data.outliers, device=device) if uses_outliers else None
    local = _local(job.method, data, device)
    return TrainingRun(
        method=job.method,
        head=head,
        context=context,
        outliers=outliers,
        outlier_local=local["outliers"] if uses_outliers else None,
        validation=(
            torch.tensor(data.validation_features, device=device),
            torch.tensor(data.validation_labels, device=device),
        ),
        validation_local=local["validation"],
        prepared=_prepare(job.method, context, outliers, data.outlier_counts),
        views=None if data.views is None else torch.tensor(data.views, device=device),
        workers=workers,
        order=generator(stream(job.seed, "order")),
        outlier_order=generator(stream(job.seed, "outlier order")),
        parameters=parameters,
        optimizer=optimizer(job.method.training, parameters.values()) if parameters else None,
    )


def _local(
    method: MethodConfig, data: TrainingData, device: torch.device
) -> dict[str, Tensor | None]:
    """Local features of the validation images and of the outliers, where the head takes them."""
    columns = {"validation": data.validation_columns, "outliers": data.outlier_columns}
    if LOCAL not in method.head.columns:
        return dict.fromkeys(columns)
    return {
        name: torch.tensor(held[LOCAL], device=device) if LOCAL in held else None
        for name, held in columns.items()
    }


def _prepare(
    method: MethodConfig,
    context: HeadContext,
    outliers: Tensor | None,
    outlier_counts: NDArray[np.int64] | None,
) -> dict[str, Tensor]:
    """What the method measures once before training, on what the backbone itself gives."""
    prepare = METHODS[method.name].prepare
    if prepare is None:
        return {}
    head = initial_head(context)

    def logits(features: Tensor) -> Tensor:
        scaled: Tensor = head.encode(features).similarity * head.logit_scale
        return scaled

    with torch.no_grad():
        initial = Initial(
            logits=logits(context.features),
            outlier_logits=logits(outliers) if outliers is not None else None,
            outlier_counts=torch.tensor(outlier_counts) if outlier_counts is not None else None,
        )
    try:
        return prepare(method, initial)
    except ValueError as error:
        raise UserError(f"method={method.name}: {error}") from None


def batches_of(run: TrainingRun) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Row numbers of the images, and of the outliers, of each step of one epoch.

    Images are shuffled anew each epoch and all are used: the last batch may be short. Outliers
    go round in shuffled passes of their own.
    """
    config, device = run.method.training, run.context.features.device
    count = len(run.context.labels)
    rows = torch.split(torch.randperm(count, generator=run.order).to(device), config.batch_size)
    if run.outliers is None:
        yield from ((part, None) for part in rows)
        return
    size = config.outlier_batch_size or 2 * config.batch_size
    passes = math.ceil(len(rows) * size / len(run.outliers))
    drawn = [torch.randperm(len(run.outliers), generator=run.outlier_order) for _ in range(passes)]
    yield from zip(rows, torch.split(torch.cat(drawn).to(device), size), strict=False)


def rate_of(run: TrainingRun, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step of an epoch: epochs count from 1, steps from 0."""
    done = _stage_of(run, epoch)[1] * steps_per_epoch
    return learning_rate(run.method.training, done + step, steps_per_epoch)


def _stage_of(run: TrainingRun, epoch: int) -> tuple[int, int]:
    """The stage of an epoch, from 0, and how many of the stage's epochs are done before it."""
    return divmod(epoch - 1, run.method.training.epochs)


def enter_stage(run: TrainingRun, epoch: int) -> None:
    """Put the head in the stage of an epoch; after the first, a stage begins at the best epoch."""
    if run.method.num_stages == 1:
        return
    stage, done = _stage_of(run, epoch)
    if stage and not done:
        _restore_best(run)
        run.optimizer = optimizer(run.method.training, run.parameters.values())
    run.head.enter_stage(stage, begins=not done)


def losses_of(
    run: TrainingRun, rows: Tensor, outlier_rows: Tensor | None, *, inner: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """What a step minimises, and the figures of its report; `inner`: of an inner update.

    Raises:
        UserError: where the maths refuses what is no number.
    """
    losses, extra = _method_losses(run, rows, outlier_rows, inner)
    total = torch.stack(list(losses.values())).sum()
    figures = {"loss": float(total.detach()), **extra}
    figures.update({f"loss/{name}": float(loss.detach()) for name, loss in losses.items()})
    return total, figures


def update(run: TrainingRun, rate: float) -> None:
    """Take a step with the gradients that are there."""
    assert run.optimizer is not None
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()


def add_up(totals: Totals, report: Mapping[str, float], weight: float) -> None:
    """Add a step's figures to those of the epoch."""
    for name, value in report.items():
        totals[name] = totals.get(name, 0.0) + value * weight


def close_epoch(run: TrainingRun, epoch: int, rate: float, totals: Totals) -> None:
    """Begin the epoch's report with the means of its figures.

    Raises:
        UserError: where the loss is no number.
    """
    count = len(run.context.labels)
    report = {"epoch": float(epoch), "lr": rate}
    report.update({name: total / count for name, total in totals.items()})
    if not math.isfinite(report["loss"]):
        raise UserError(
            f"method={run.method.name}: the loss is {report['loss']} after epoch {epoch}; "
            f"try a smaller training.lr than {run.method.training.lr}"
        )
    run.history.append(report)


def _method_losses(
    run: TrainingRun, rows: Tensor, outlier_rows: Tensor | None, inner: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    context, device = run.context, run.context.features.device
    features = [_image_features(run, rows)]
    # Only a head that takes local features is given them; a loss finds them in `Batch`.
    local = [context.columns[LOCAL][rows]] if LOCAL in run.method.head.columns else []
    if outlier_rows is not None and run.outliers is not None:
        features.append(run.outliers[outlier_rows])
        if local and run.outlier_local is not None:
            local.append(run.outlier_local[outlier_rows])
    batch = Batch(
        labels=context.labels[rows],
        columns={name: column[rows] for name, column in context.columns.items()},
        prepared=run.prepared,
    )
    half = run.method.training.precision == "bf16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        given = [torch.cat(parts) for parts in (features, local) if parts]
        outputs = _outputs(run, given, batch)
    plugin = METHODS[run.method.name]
    loss = plugin.inner_loss if inner else plugin.loss
    assert loss is not None  # `Config.inner_steps` promised one
    try:
        losses, report = loss(outputs, batch, run.method)
    except ValueError as error:
        # The maths refuses what is no number; for the user that is a training gone wrong.
        raise UserError(
            f"method={run.method.name}: {error}; try a smaller training.lr than "
            f"{run.method.training.lr}"
        ) from None
    return losses, report


def _image_features(run: TrainingRun, rows: Tensor) -> Tensor:
    """The features (N, D) that this epoch learns from: of the images, or of one view of each.

    Local features are those of the images, and what reads both needs them of one image.
    """
    if run.views is None or LOCAL in columns_of(run.method):
        return run.context.features[rows]
    return run.views[rows, len(run.history) % run.views.shape[1]]


def _outputs(run: TrainingRun, given: Sequence[Tensor], batch: Batch) -> Outputs:
    """One pass of the head over images and outliers together: one encoding of the text.

    `given`: features (N, D) of both, and local features where the head takes them.
    """
    workers, count, num_images = run.workers, len(given[0]), len(batch.labels)
    encode_batch = HEADS[run.method.head.name].encode_batch
    if encode_batch is not None:
        # Rows that depend on each other: every worker computes all of them, for 1 / W each.
        encoded = encode_batch(run.head, given[0], batch.columns)
        shared = workers.shared
        similarity, image_features = shared(encoded.similarity), shared(encoded.image_features)
        rows = {name: shared(part) for name, part in encoded.rows.items()}
    elif workers.split == "rows":
        encoded = run.head.encode(*(part[workers.part(count)] for part in given))
        similarity = workers.gather(encoded.similarity, count)
        image_features = workers.gather(encoded.image_features, count)
        rows = {name: workers.gather(part, count) for name, part in encoded.rows.items()}
        shared = workers.shared
    else:
        encoded = run.head.encode(*given)
        similarity, image_features = encoded.similarity, encoded.image_features
        rows, shared = dict(encoded.rows), _as_is
    text = encoded.text_features
    logits = similarity * run.head.logit_scale
    has_outliers = count > num_images
    return Outputs(
        similarity=similarity[:num_images],
        logits=logits[:num_images],
        image_features=image_features[:num_images],
        text_features=shared(text) if text is not None else None,
        outlier_similarity=similarity[num_images:] if has_outliers else None,
        outlier_logits=logits[num_images:] if has_outliers else None,
        logit_scale=run.head.logit_scale,
        extra={name: shared(value) for name, value in encoded.extra.items()},
        rows={name: value[:num_images] for name, value in rows.items()},
    )


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def judge(run: TrainingRun, epoch: int) -> None:
    """Add validation figures to the epoch's report and keep the epoch if it is the best yet."""
    if not run.history or run.history[-1]["epoch"] != epoch:
        run.history.append({"epoch": float(epoch)})
    report = run.history[-1]
    features, labels = run.validation
    better = True
    if len(labels):
        with torch.no_grad():
            given = [part for part in (features, run.validation_local) if part is not None]
            logits = run.head.encode(*given).similarity.float() * run.head.logit_scale
            right = _adjusted(run, logits).argmax(dim=1) == labels
            report["validation/accuracy"] = float(right.float().mean())
            report["validation/cross_entropy"] = float(F.cross_entropy(logits, labels))
        stage = _stage_of(run, epoch)[0]
        earlier = [
            _rank(h)
            for h in run.history[:-1]
            if h["epoch"] == run.best_epoch and _stage_of(run, run.best_epoch)[0] == stage
        ]
        rank = _rank(report)
        better = not earlier or rank > earlier[0] or (stage > 0 and rank == earlier[0])
    if better:
        run.best_epoch = epoch
        run.best = {name: p.detach().clone() for name, p in run.parameters.items()}


def _rank(report: EpochReport) -> tuple[float, float]:
    return report["validation/accuracy"], -report["validation/cross_entropy"]


def _shares(run: TrainingRun) -> Tensor:
    """Share of each class among the training images, float64 (K,)."""
    labels = run.context.labels
    counts = torch.bincount(labels, minlength=len(run.context.class_names)).double()
    return counts / len(labels)


def _adjusted(run: TrainingRun, logits: Tensor) -> Tensor:
    """Logits as the predicted class sees them; no loss and no score does."""
    strength = run.method.adjust_logits
    return adjust_logits(logits, _shares(run), strength) if strength else logits


def finish(run: TrainingRun) -> Trained:
    """The head of the best epoch, and of the last."""
    last = predictor_of(run)
    _restore_best(run)
    return Trained(predictor_of(run), last, run.best_epoch, tuple(run.history))


def _restore_best(run: TrainingRun) -> None:
    """Put the parameters where they were after the best epoch."""
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(run.best[name])


def predictor_of(run: TrainingRun) -> Predictor:
    """The head as it is now, with what its predicted class is corrected by."""
    predictor: Predictor = run.head.predictor()
    if not run.method.adjust_logits:
        return predictor
    return replace(
        predictor,
        class_prior=tuple(_shares(run).tolist()),
        adjustment=run.method.adjust_logits,
    )
