"""Training of the energy-correction model and of the stand-alone EBM (Lafon 2022): one loop.

Each step draws a batch of features and as many chains, moves the chains by SGLD under the model as
it is, and takes one Adam step on `correction_loss`. Every random number comes from one generator,
in float32, so that a seed decides everything: also in float64, and on several workers, where each
draws the whole batch's numbers and uses its own rows. W workers then equal one to rounding.

Each epoch is reported (`EpochReport`); a run that diverges stops with `Diverged`, never with NaN.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pipelines.ood.checks import Array
from pipelines.ood.density import GaussianMixture
from pipelines.ood.energy_correction import (
    EnergyCorrection,
    EnergySettings,
    FeatureEBM,
    Network,
    correction_loss,
    projected,
    sgld,
)
from pipelines.ood.records import move
from pipelines.ood.statistics import feature_rows, l2_normalized

EpochReport: TypeAlias = dict[str, float]
Model: TypeAlias = EnergyCorrection | FeatureEBM

_BLOCK = 2**22  # numbers in the largest temporary when all features are measured
# A component is reached by a sample as near to its mean as this share of the features is to theirs.
_REACH = 0.99
# Energies this many times beyond what the L2 term allows at its minimum mean divergence; samples,
# this many times longer than features and starts.
_LIMIT = 100.0


class Diverged(ValueError):
    """Training left the range in which it can succeed; the message says what to change."""


class Parallel(Protocol):
    """How several workers share a batch; `pipelines.heads.parallel.Workers` is one."""

    def part(self, count: int) -> slice:
        """This worker's part of `count` rows."""

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the sum over workers."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over workers."""


class Alone:
    """One worker."""

    def part(self, count: int) -> slice:
        """All rows."""
        return slice(0, count)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Nothing to add."""

    def total(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


@dataclass(frozen=True)
class Trained:
    """A trained model, in float64 on the CPU, and one report an epoch."""

    model: Model
    history: tuple[EpochReport, ...]


@dataclass
class _Totals:
    """Sums over the chains of an epoch, and which components they reached."""

    sums: Tensor  # (M,) as `_NAMES`
    reached: Tensor  # (C,) 0 or more
    rows: int = 0


_NAMES = (
    "loss",
    "network/real",
    "network/sampled",
    "energy/real",
    "energy/sampled",
    "drift",
    "norm/real",
    "norm/sampled",
    "norm/start",
)


@dataclass(frozen=True, eq=False)
class TrainerState:
    """All that the next epoch depends on; `torch.load(weights_only=True)` reads its `vars`.

    Attributes:
        parameters: of the network, in its order.
        adam: the optimiser's `state_dict`.
        random, order: states of the generators of chains and of batches.
        history: the figures of each finished epoch.
    """

    parameters: list[Tensor]
    adam: dict[str, Any]
    random: Tensor
    order: Tensor
    history: list[EpochReport]


class EnergyTrainer:
    """The state of one training; `epoch` trains, `state` and `load` make it resumable."""

    def __init__(
        self,
        features: Array,
        mixture: GaussianMixture,
        settings: EnergySettings,
        *,
        seed: int,
        parallel: Parallel | None = None,
    ) -> None:
        """Start from random weights.

        Args:
            features: (N, D), trained on in their own dtype (at least float32) and device.
            mixture: The reference, and where coverage is measured. Its `normalize` is followed;
                its T_G is not: that of `settings` is the model's.
            settings: Every value given.
            seed: Decides weights, batches and chains.
            parallel: Where several workers train together.

        Raises:
            ValueError: Features are not (N, D) of the mixture's D, are empty, or hold NaN or inf.
        """
        rows = feature_rows(features, mixture.gaussians.means.shape[1])
        if len(rows) == 0:
            raise ValueError("features is empty: there is nothing to train on")
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.features = l2_normalized(rows) if mixture.normalize else rows
        self.settings, self.parallel = settings, parallel or Alone()
        self.mixture = GaussianMixture(
            mixture.gaussians, settings.T_G, mixture.weighted, mixture.normalize
        )
        self._mixture = move(self.mixture, rows.device, rows.dtype)
        # Chains draw on their own device; weights and batches on the CPU, the same everywhere.
        self._random = torch.Generator(rows.device).manual_seed(3 * seed)
        self._order = torch.Generator().manual_seed(3 * seed + 1)
        start = Network.random(
            rows.shape[1],
            torch.Generator().manual_seed(3 * seed + 2),
            width=settings.width,
            hidden=settings.hidden,
            shared=settings.shared_hidden,
        )
        self.network = start.with_parameters(
            [p.to(rows.device, rows.dtype).requires_grad_() for p in start.parameters]
        )
        trained, betas = self.network.parameters, settings.betas
        self._adam = torch.optim.Adam(trained, lr=settings.lr, betas=betas, fused=True)
        self._schedule = settings.schedule()
        self._mixture_energy, self._reach = self._measure()
        self.history: list[EpochReport] = []

    def model(self) -> Model:
        """The model as it is now."""
        network = move(_detached(self.network), "cpu", torch.float64)
        if not self.settings.reference:
            return FeatureEBM(network, self.settings.T, self.mixture.normalize)
        return EnergyCorrection(network, move(self.mixture, "cpu"), self.settings.T)

    def epoch(self) -> EpochReport:
        """One pass over the features; its report is added to `history`.

        Raises:
            Diverged: Energies, samples or the loss left their range.
        """
        number = len(self.history) + 1
        components = len(self._mixture.gaussians.means)
        totals = _Totals(
            self.features.new_zeros(len(_NAMES), dtype=torch.float64),
            self.features.new_zeros(components),
        )
        order = torch.randperm(len(self.features), generator=self._order)
        for rows in torch.split(order.to(self.features.device), self.settings.batch_size):
            self._step(rows, totals)
        report = {"epoch": float(number), **self._report(totals)}
        self._check(report, number)
        self.history.append(report)
        return report

    def state(self) -> TrainerState:
        """All that the next epoch depends on."""
        return TrainerState(
            parameters=[p.detach().clone() for p in self.network.parameters],
            adam=self._adam.state_dict(),
            random=self._random.get_state(),
            order=self._order.get_state(),
            history=[dict(report) for report in self.history],
        )

    def load(self, state: TrainerState) -> None:
        """Go on where `state` was taken."""
        with torch.no_grad():
            for parameter, value in zip(self.network.parameters, state.parameters, strict=True):
                parameter.copy_(value)
        self._adam.load_state_dict(state.adam)
        self._random.set_state(state.random)
        self._order.set_state(state.order)
        self.history = [dict(report) for report in state.history]

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """This worker's chains of a batch of `count`: their starts and ends (n, D)."""
        own, settings = self.parallel.part(count), self.settings
        start = self._start(count)[own]
        end = sgld(
            self._chain_energy(),
            start,
            *self._schedule,
            normal=lambda: self._normal(count, start.shape[1])[own],
            project=settings.project,
        )
        return start, end

    def _start(self, count: int) -> Tensor:
        """z_0 (count, D): draws of the mixture, or of N(0, initial_std^2 I)."""
        gaussians = self._mixture.gaussians
        if self.settings.reference:
            shares = gaussians.log_prior.float().exp()
            classes = torch.multinomial(shares, count, replacement=True, generator=self._random)
            noise = self._normal(count, len(gaussians.spread))
            start = gaussians.means[classes] + noise @ gaussians.spread
        else:
            start = self._normal(count, self.features.shape[1]) * self.settings.initial_std
        return projected(start, self.settings.project)

    def _normal(self, rows: int, columns: int) -> Tensor:
        drawn = torch.empty(rows, columns, device=self.features.device)
        return drawn.normal_(generator=self._random).to(self.features.dtype)

    def _chain_energy(self) -> Callable[[Tensor], Tensor]:
        """E of the model as it is: weights take no gradient here."""
        network, settings = self._cast(_detached(self.network)), self.settings
        if not settings.reference:
            return lambda rows: network(rows) / settings.T
        mixture = self._mixture
        return lambda rows: network(rows) / settings.T + mixture.energy(rows) / settings.T_G

    def _cast(self, network: Network) -> Network:
        return move(network, torch.bfloat16) if self.settings.precision == "bf16" else network

    def _step(self, rows: Tensor, totals: _Totals) -> None:
        """One update; adds what it saw to `totals`."""
        settings, count = self.settings, len(rows)
        own = self.parallel.part(count)
        start, samples = self.sample(count)
        real = self.features[rows[own]]
        negatives = (samples, start) if settings.starts_are_negatives else (samples,)
        inputs = torch.stack([real, *negatives])  # (1 + C, n, D)
        noise = self._normal(len(inputs) * count, real.shape[1]).mul_(settings.input_noise)
        inputs = inputs + noise.reshape(len(inputs), count, -1)[:, own]
        energies = self._cast(self.network)(inputs.flatten(0, 1)) / settings.T
        energies = energies.reshape(inputs.shape[:2])
        loss = correction_loss(energies[0], energies[1:], l2_weight=settings.l2_weight, count=count)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.parallel.add_gradients(self.network.parameters)
        self._adam.step()
        with torch.no_grad():
            self._add(totals, rows[own], (real, start, samples), (loss * count, *energies[:2]))
        totals.rows += count

    def _add(
        self,
        totals: _Totals,
        rows: Tensor,
        features: tuple[Tensor, Tensor, Tensor],
        results: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Sums of one step; `results` are the loss x rows, e(z) and e(z')."""
        (real, start, samples), (loss, own, sampled) = features, results
        squared = self._mixture.gaussians.squared_distances(samples)
        nearest, component = squared.min(dim=1)
        totals.reached.index_add_(0, component, (nearest <= self._reach).to(totals.reached))
        share = float(self.settings.reference) / self.settings.T_G
        values = (
            loss,
            own.sum(),
            sampled.sum(),
            own.sum() + share * self._mixture_energy[rows].sum(),
            sampled.sum() + share * self._mixture.energy(samples).sum(),
            (samples - start).norm(dim=1).sum(),
            real.norm(dim=1).sum(),
            samples.norm(dim=1).sum(),
            start.norm(dim=1).sum(),
        )
        totals.sums += torch.stack([value.detach().double() for value in values])

    def _report(self, totals: _Totals) -> EpochReport:
        means = self.parallel.total(totals.sums) / totals.rows
        reached = self.parallel.total(totals.reached) > 0
        report = dict(zip(_NAMES, means.tolist(), strict=True))
        return {**report, "coverage": float(reached.double().mean())}

    def _check(self, report: EpochReport, number: int) -> None:
        """Stop where the epoch's figures say that no later one will do better.

        They are those of all workers, so that all stop together and none waits for another.
        """
        if not math.isfinite(report["loss"]):
            raise Diverged(self._advice(number, f"the loss is {report['loss']}"))
        bound = _LIMIT / (2 * self.settings.l2_weight) if self.settings.l2_weight else 1e6
        longest = _LIMIT * max(report["norm/real"], report["norm/start"])
        for name in ("network/real", "network/sampled"):
            if not abs(report[name]) <= bound:
                reason = f"{name} is {report[name]:.3g}, beyond {bound:.3g}"
                raise Diverged(self._advice(number, reason))
        if not report["norm/sampled"] <= longest:
            reason = f"samples have length {report['norm/sampled']:.3g}, beyond {longest:.3g}"
            raise Diverged(self._advice(number, reason))

    def _advice(self, number: int, reason: str) -> str:
        settings = self.settings
        return (
            f"the energy model diverged in epoch {number}: {reason}; try a smaller lr than "
            f"{settings.lr:.3g}, a larger l2_weight than {settings.l2_weight:g}, or smaller "
            f"step_size than {settings.step_size[0]:.3g}"
        )

    def _measure(self) -> tuple[Tensor, Tensor]:
        """E_G of every feature (N,), and the squared distance within which most of them lie."""
        gaussians = self._mixture.gaussians
        step = max(1, _BLOCK // max(gaussians.whitener.shape))
        energies, nearest = [], []
        for block in torch.split(self.features, step):
            energies.append(self._mixture.energy(block))
            nearest.append(gaussians.squared_distances(block).amin(dim=1))
        ordered = torch.cat(nearest).sort().values
        return torch.cat(energies), ordered[math.ceil(_REACH * len(ordered)) - 1]


def _detached(network: Network) -> Network:
    return network.with_parameters([p.detach() for p in network.parameters])


def train(
    features: Array,
    mixture: GaussianMixture,
    settings: EnergySettings,
    *,
    seed: int = 0,
    parallel: Parallel | None = None,
    on_epoch: Callable[[EnergyTrainer], None] | None = None,
    state: TrainerState | None = None,
) -> Trained:
    """Train a model on features (N, D).

    Args:
        features: (N, D).
        mixture: Fitted to them (`GaussianMixture.fit` or, from shards, `from_statistics`).
        settings: `scaled(CORRECTION, ...)`, the paper's `CORRECTION` and `EBM`, or your own.
        seed: Decides weights, batches and chains.
        parallel: Where several workers train together.
        on_epoch: Called after each epoch, to report it or keep its `state()`.
        state: Go on from here.

    Raises:
        ValueError: As `EnergyTrainer`.
        Diverged: Training left the range in which it can succeed.
    """
    trainer = EnergyTrainer(features, mixture, settings, seed=seed, parallel=parallel)
    if state is not None:
        trainer.load(state)
    while len(trainer.history) < settings.epochs:
        trainer.epoch()
        if on_epoch is not None:
            on_epoch(trainer)
    return Trained(trainer.model(), tuple(trainer.history))
