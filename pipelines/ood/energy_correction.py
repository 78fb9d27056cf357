"""The energy-correction model of Lafon 2022, and its two ablations, as scores of features.

Lafon et al. 2022, "Energy Correction Model in the Feature Space for Out-of-Distribution
Detection". A density p(z) ~ exp(-E(z)) in feature space with

    E(z) = E_theta(z) / T + E_G(z) / T_G                (Lafon 2022 eq. 1 and 3)

E_theta is a small network, E_G the energy of the class-conditional Gaussian mixture. The score is
-E, HIGH for in-distribution. Without E_G it is the stand-alone energy-based model (`FeatureEBM`),
without E_theta the mixture alone (`density.GaussianMixture`, which ranks like SSD).

Energies are LOW for in-distribution. The network is trained in `energy_training`; here are the
model, the sampler, the loss and the settings. With the paper's decoupled step sizes and noise
(and with few steps) the sampler's draws are not draws of p: see `docs/energy_correction.md`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.ood.checks import Array
from pipelines.ood.density import GaussianMixture
from pipelines.ood.statistics import ClassStatistics, feature_rows, l2_normalized

_BLOCK = 2**22  # numbers in the largest temporary of one block of rows
_SLOPE = 0.2  # of LeakyReLU, as in the authors' later code; the paper names no activation

# Where a chain's rows are put after each step (`projected`).
Projection: TypeAlias = Literal["none", "sphere", "positive_sphere"]


@dataclass(frozen=True, eq=False)
class Network:
    """E_theta: an MLP from features (N, D) to energies (N,), LeakyReLU between its layers.

    `weights` (out, in) and `biases` (out,) of the first, the inner and the last layer; every inner
    layer is applied `repeats` times, which is how one layer is shared.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    repeats: int

    @classmethod
    def random(
        cls,
        num_columns: int,
        generator: torch.Generator,
        *,
        width: int = 1024,
        hidden: int = 5,
        shared: bool = False,
    ) -> Self:
        """Uniform weights within 1 / sqrt(inputs), torch's own rule for a linear layer.

        Args:
            num_columns: D.
            generator: On the CPU, so that every device starts from the same weights.
            width: Outputs of each hidden layer.
            hidden: Number of hidden layers, at least 1. Lafon 2022's 6-layer network ("4 hidden
                layers" in A.5.1) has five: one from D, four from `width`; and one to the energy.
            shared: The hidden layers after the first are one layer applied again and again.
        """
        inner = hidden - 1
        sizes = [num_columns, *[width] * (1 + (min(inner, 1) if shared else inner)), 1]
        weights, biases = [], []
        for inputs, outputs in pairwise(sizes):
            drawn = torch.rand(outputs, inputs + 1, generator=generator)
            bounded = (2 * drawn - 1) / math.sqrt(inputs)
            weights.append(bounded[:, :-1].contiguous())
            biases.append(bounded[:, -1].contiguous())
        return cls(tuple(weights), tuple(biases), inner if shared and inner else 1)

    def __call__(self, features: Tensor) -> Tensor:
        """Energies (N,) in the features' dtype, computed in that of the weights."""
        rows = features.to(self.weights[0].dtype)
        last = len(self.weights) - 1
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            for _ in range(self.repeats if 0 < place < last else 1):
                rows = F.linear(rows, weight, bias)
                if place < last:
                    rows = F.leaky_relu(rows, _SLOPE, inplace=True)
        return rows[:, 0].to(features.dtype)

    @property
    def parameters(self) -> list[Tensor]:
        """Weights and biases, in order."""
        return [*self.weights, *self.biases]

    def with_parameters(self, parameters: list[Tensor]) -> Self:
        """The same architecture with other `parameters`."""
        count = len(self.weights)
        return replace(self, weights=tuple(parameters[:count]), biases=tuple(parameters[count:]))


@dataclass(frozen=True, eq=False)
class EnergyCorrection:
    """-(E_theta / T + E_G / T_G), the mixture corrected by a network (Lafon 2022 eq. 1; A.2)."""

    network: Network
    mixture: GaussianMixture
    T: float

    def energy(self, features: Tensor) -> Tensor:
        """E (N,) of features as they are; differentiable."""
        return self.network(features) / self.T + self.mixture.energy(features) / self.mixture.T_G

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,), float64."""
        return _scores(self.energy, features, self.network, normalize=self.mixture.normalize)


@dataclass(frozen=True, eq=False)
class FeatureEBM:
    """-E_theta / T: the stand-alone energy-based model of Lafon 2022's ablation ("w/o MoG")."""

    network: Network
    T: float
    normalize: bool

    def energy(self, features: Tensor) -> Tensor:
        """E (N,) of features as they are; differentiable."""
        return self.network(features) / self.T

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,), float64."""
        return _scores(self.energy, features, self.network, normalize=self.normalize)


def _scores(
    energy: Callable[[Tensor], Tensor], features: Array, network: Network, *, normalize: bool
) -> Tensor:
    """-energy (N,) of features (N, D), a block of float64 rows at a time."""
    first = network.weights[0]
    rows = feature_rows(features, first.shape[1])
    step = max(1, _BLOCK // max(first.shape))
    with torch.no_grad():
        blocks = (part.to(first.device, torch.float64) for part in torch.split(rows, step))
        return torch.cat([-energy(l2_normalized(b) if normalize else b) for b in blocks])


def sgld(
    energy: Callable[[Tensor], Tensor],
    start: Tensor,
    step_sizes: Tensor,
    noise_stds: Tensor,
    *,
    normal: Callable[[], Tensor],
    project: Projection = "none",
) -> Tensor:
    """z_{t+1} = z_t - a_t grad E(z_t) + n_t eps, eps ~ N(0, I) (Lafon 2022 eq. 3 and 8).

    n_t is a STANDARD DEVIATION: the paper writes sqrt(beta_t) and gives 1e-3, which as a variance
    would add noise of norm 0.7 to features of norm 1. With n_t^2 = 2 a_t this is the unadjusted
    Langevin algorithm, which samples exp(-E) up to a bias of order a_t; the paper's a_t and n_t are
    decoupled and sample no stated density. All chains run at once: E is summed over rows, which
    leaves each row its own gradient.

    Args:
        energy: Maps (N, D) to (N,), each row on its own.
        start: z_0 (N, D).
        step_sizes: a_t (S,).
        noise_stds: n_t (S,).
        normal: Gives eps (N, D) of the next step.
        project: Where rows are put after each step; `positive_sphere` as in the authors' later
            code.

    Returns:
        z_S (N, D), detached: no gradient flows through the chain.
    """
    rows = start.detach().clone()
    for step, noise in zip(step_sizes.tolist(), noise_stds.tolist(), strict=True):
        with torch.enable_grad():
            rows.requires_grad_()
            (gradient,) = torch.autograd.grad(energy(rows).sum(), rows)
        rows = torch.add(rows.detach(), gradient, alpha=-step).add_(normal(), alpha=noise)
        rows = projected(rows, project)
    return rows


def projected(rows: Tensor, project: Projection) -> Tensor:
    """Rows (N, D) as they are, at unit length, or without negative entries and at unit length."""
    if project == "positive_sphere":
        return F.normalize(F.relu(rows))  # a row without a positive entry is 0, as in that code
    return l2_normalized(rows) if project == "sphere" else rows


def correction_loss(
    real: Tensor, sampled: Tensor, l2_weight: float, *, count: int | None = None
) -> Tensor:
    """The scalar mean e(z) - mean e(z') + l2_weight (mean e(z)^2 + mean e(z')^2).

    Lafon 2022 eq. 2 and 7 with the L2 term of section 2.2. At its minimum e lies within
    +-1 / (2 l2_weight), so the correction is bounded by that.

    Args:
        real: e = E_theta / T of features (N,).
        sampled: e of the sampler's draws (N,), or of C negatives a chain (C, N).
        l2_weight: alpha in Lafon 2022, >= 0.
        count: What sums are divided by, for a part of a batch; by default N.
    """
    negatives = sampled if sampled.ndim == 2 else sampled[None]
    total = real.sum() - negatives.sum() / len(negatives)
    squares = real.square().sum() + negatives.square().sum() / len(negatives)
    return (total + l2_weight * squares) / (len(real) if count is None else count)


@dataclass(frozen=True)
class EnergySettings:
    """How a model is trained and sampled; `CORRECTION` and `EBM` hold the paper's values (A.5.1).

    Attributes:
        reference: Chains start from the mixture, whose energy is part of E; False: the EBM alone.
        T: Temperature of the network's energy.
        T_G: Temperature of the mixture's energy.
        l2_weight: Of the L2 term.
        steps: SGLD steps.
        step_size: a_t from, to.
        noise: n_t from, to, standard deviations.
        decay: of both from step to step: linear, the last step's value being the second; or
            quadratic, x_t = (from - to) (1 - t / S)^2 + to, as the authors' later code has it.
        input_noise: Standard deviation of what is added to the network's inputs in training.
        initial_std: The EBM's chains start from N(0, initial_std^2 I).
        starts_are_negatives: The chains' starts count as negatives beside their ends, as in the
            authors' later code.
        project: Where samples are put after each step.
        epochs: Passes over the features.
        batch_size: Features, and chains, a step.
        lr: Adam's learning rate.
        betas: Adam's; the authors' later code has (0, 0.999).
        width: Of the hidden layers.
        hidden: Number of hidden layers; the network has one linear layer more.
        shared_hidden: All hidden layers after the first are one, as in the authors' later code.
        precision: bf16 computes the network's products in bfloat16.
    """

    reference: bool = True
    T: float = 1.0
    T_G: float = 1e3
    l2_weight: float = 10.0
    steps: int = 20
    step_size: tuple[float, float] = (1e-6, 1e-7)
    noise: tuple[float, float] = (1e-3, 1e-4)
    decay: Literal["linear", "quadratic"] = "linear"
    input_noise: float = 1e-3
    initial_std: float = 1.0
    starts_are_negatives: bool = False
    project: Projection = "none"
    epochs: int = 20
    batch_size: int = 256
    lr: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    width: int = 1024
    hidden: int = 5
    shared_hidden: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        positive = ("T", "T_G", "steps", "epochs", "batch_size", "lr", "width", "hidden")
        wrong = [n for n in positive if not 0 < getattr(self, n) < math.inf]
        lengths = (*self.step_size, *self.noise, self.input_noise, self.initial_std, self.l2_weight)
        if wrong or not all(0 <= value < math.inf for value in lengths):
            raise ValueError(
                f"{', '.join(positive)} must be > 0, and step_size, noise, input_noise, "
                f"initial_std and l2_weight >= 0, all finite; came {self}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1); came {self.betas}")

    def schedule(self) -> tuple[Tensor, Tensor]:
        """a_t and n_t of every step, (S,) each, float64."""
        return self._decayed(*self.step_size), self._decayed(*self.noise)

    def _decayed(self, first: float, last: float) -> Tensor:
        if self.decay == "linear":
            return torch.linspace(first, last, self.steps, dtype=torch.float64)
        left = 1 - torch.arange(self.steps, dtype=torch.float64) / self.steps
        return (first - last) * left**2 + last


CORRECTION = EnergySettings()
EBM = EnergySettings(
    reference=False, T=1e-2, l2_weight=0.1, steps=200, step_size=(1e-2, 1e-3), noise=(1e-2, 1e-3),
    lr=5e-5,
)  # fmt: skip

# What the paper's values were made for. Its ResNet-34 features have 512 dimensions and unit length;
# their spread is not printed: 0.02 a dimension is a fifth of the squared length within classes.
_PAPER_DIMENSIONS, _PAPER_SPREAD = 512, 0.02
_PAPER_UPDATES = 20 * math.ceil(50_000 / 256)  # 20 epochs of CIFAR in batches of 256
_LARGEST_LR = 1e-3


def scaled(
    settings: EnergySettings, statistics: ClassStatistics, mixture: GaussianMixture
) -> EnergySettings:
    """The paper's settings carried over to features of another dimension, spread and number.

    The rule (exact where the features are the paper's):

    - lengths (noise, input_noise) x f, step_size x f^2, with f = s / 0.02 and s the standard
      deviation within classes, the root of tr(Sigma) / D;
    - T_G = 1e3 x m / 512, m the mean squared distance of a feature to its class (D, unless the
      covariance was shrunk), so that E_G / T_G keeps its mean of a half;
    - lr x 3920 / updates, up to 1e-3: Adam's steps have the length of lr, so their sum is kept;
    - initial_std = the features' root mean square entry: chains start at the features' length.
    """
    variance = float(statistics.scatter.trace()) / max(statistics.num_samples, 1)
    columns = statistics.scatter.shape[0]
    factor = math.sqrt(variance / columns) / _PAPER_SPREAD
    second_moment = variance + float(statistics.prior @ (statistics.means**2).sum(axis=1))
    updates = settings.epochs * math.ceil(statistics.num_samples / settings.batch_size)
    first, last = settings.step_size
    return replace(
        settings,
        T_G=settings.T_G * _mean_distance(statistics, mixture) / _PAPER_DIMENSIONS,
        step_size=(first * factor**2, last * factor**2),
        noise=(settings.noise[0] * factor, settings.noise[1] * factor),
        input_noise=settings.input_noise * factor,
        initial_std=math.sqrt(second_moment / columns),
        lr=min(settings.lr * _PAPER_UPDATES / updates, _LARGEST_LR),
    )


def _mean_distance(statistics: ClassStatistics, mixture: GaussianMixture) -> float:
    """Mean of (z - mu_c)^T Sigma^-1 (z - mu_c) over features and their own classes c."""
    whitener = mixture.gaussians.whitener.double().cpu()
    covariance = torch.from_numpy(statistics.covariance)
    return float(((covariance @ whitener) * whitener).sum())
