"""Theorem 3.5 of the DeltaEnergy paper, both sides of its inequality on a small problem.

The theorem: at a local optimum theta of min L = mean(E0 - E2), with |z_i - z_i * m'_i| <= eps,

    |theta^T (H_S - H_S') theta| <= (eps / N) sum_i |theta^T d2h_{y_i}(theta) theta|

where H_S and H_S' are the Hessians of the classification loss on the features z_i and on the
masked features z_i * m'_i. Here: D = 8, K = 3, N = 60, a nonlinear text map, the masks taken once
at the starting point (S' is a fixed domain), cross-entropy and L at one temperature tau, L alone
minimised to a gradient norm below 1e-6.

What must hold is another identity. Cross-entropy is -s_y / tau - E0, so that

    theta^T (H_S - H_S') theta = -(1 / (tau N)) sum_i (z_i - z_i * m'_i) . d2h_{y_i}[theta, theta]
                                 - theta^T (d2 L) theta

The first term is what the theorem's right side bounds, if that is divided by tau; the second is
>= 0 at a local minimum of L, not 0, and the right side has no room for it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.functional import cross_entropy, normalize

from pipelines.experiments.derivatives import Function, hessian
from pipelines.experiments.text_map import TextMap
from pipelines.plots import COLOURS, label, markdown_table, panels, save, write_csv

SEEDS = range(20)
TAUS = (1.0, 0.1)
KEEP = 0.5
TOLERANCE = 1e-6
_WIDTH, _CLASSES, _SAMPLES, _PARAMETERS = 8, 3, 60, 5


@dataclass(frozen=True)
class Problem:
    """Features of a domain S and of its masked copy S', float64.

    Attributes:
        text: The text map h.
        start: theta (P,) at which the masks are taken and the minimisation starts.
        images: z (N, D), unit rows.
        masked: z * m' (N, D).
        labels: (N,).
        tau: Temperature of the cross-entropy and of the energies.
    """

    text: TextMap
    start: Tensor
    images: Tensor
    masked: Tensor
    labels: Tensor
    tau: float

    def bound(self, theta: Tensor) -> Tensor:
        """L(theta) = mean(E0 - E2), to be minimised; the masks are fixed."""
        texts = self.text(theta).T / self.tau
        return ((self.masked @ texts).logsumexp(1) - (self.images @ texts).logsumexp(1)).mean()

    def risk(self, features: Tensor, theta: Tensor) -> Tensor:
        """Cross-entropy of `features` (N, D)."""
        return cross_entropy(features @ self.text(theta).T / self.tau, self.labels)


@dataclass(frozen=True)
class Outcome:
    """Both sides of the inequality at one point theta, and the two terms of the identity.

    `holds` is the theorem as printed, `holds_scaled` with its right side divided by tau.
    """

    seed: int
    tau: float
    theta_norm: float
    gradient_norm: float
    least_curvature: float
    left: float
    right: float
    holds: bool
    holds_scaled: bool
    image_term: float
    bound_curvature: float


def make_problem(seed: int, tau: float) -> Problem:
    """Three clusters of unit features and a random text map."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(_SAMPLES) % _CLASSES
    centres = normalize(normal(_CLASSES, _WIDTH), dim=1)
    images = normalize(centres[labels] + 0.5 * normal(_SAMPLES, _WIDTH), dim=1)
    none = torch.zeros(_CLASSES, _WIDTH, dtype=torch.float64)
    text = TextMap.random(none, generator, width=16, num_parameters=_PARAMETERS)
    start = normal(_PARAMETERS)
    product = images * text(start)[labels]
    kept = product.topk(max(1, round(KEEP * _WIDTH)), dim=1).indices
    masked = images * torch.zeros_like(images).scatter(1, kept, 1.0)
    return Problem(text, start, images, masked, labels, tau)


def minimise(loss: Function, theta: Tensor) -> Tensor:
    """A local minimum by damped Newton steps that leave saddles along negative curvature.

    Raises:
        RuntimeError: The gradient norm is not below `TOLERANCE` after 500 steps.
    """
    for _ in range(500):
        gradient = grad(loss)(theta)
        if gradient.norm() < TOLERANCE:
            return theta
        values, vectors = torch.linalg.eigh(hessian(loss)(theta))
        step = -vectors @ ((vectors.T @ gradient) / values.abs().clamp(min=1e-6))
        step = step * (0.5 / step.norm()).clamp(max=1.0)
        while loss(theta + step) > loss(theta) + 1e-4 * gradient @ step:
            step = step / 2
        theta = theta + step
    raise RuntimeError(f"no local minimum within 500 steps: gradient norm {gradient.norm():.2g}")


def judge(problem: Problem, theta: Tensor, seed: int) -> Outcome:
    """Both sides of the theorem's inequality at `theta`."""
    gap = problem.images - problem.masked
    curvature = {
        name: hessian(partial(problem.risk, features))(theta)
        for name, features in (("S", problem.images), ("S'", problem.masked))
    }
    bound_hessian = hessian(problem.bound)(theta)
    # d2h_k[theta, theta] for each class, (K, D)
    bend = torch.einsum("kdpq,p,q->kd", hessian(problem.text)(theta), theta, theta)[problem.labels]
    left = (theta @ (curvature["S"] - curvature["S'"]) @ theta).abs()
    right = gap.norm(dim=1).max() * bend.norm(dim=1).mean()
    return Outcome(
        seed=seed,
        tau=problem.tau,
        theta_norm=float(theta.norm()),
        gradient_norm=float(grad(problem.bound)(theta).norm()),
        least_curvature=float(torch.linalg.eigvalsh(bound_hessian).min()),
        left=float(left),
        right=float(right),
        holds=bool(left <= right),
        holds_scaled=bool(left <= right / problem.tau),
        image_term=float(-(gap * bend).sum(dim=1).mean() / problem.tau),
        bound_curvature=float(theta @ bound_hessian @ theta),
    )


def experiment(seed: int, tau: float) -> tuple[Outcome, Outcome]:
    """The inequality at the minimum of the bound, and at the random point it started from."""
    problem = make_problem(seed, tau)
    theta = minimise(problem.bound, problem.start)
    return judge(problem, theta, seed), judge(problem, problem.start, seed)


def run(folder: Path) -> str:
    """Write theorem_3_5.csv and theorem_3_5.png; return the tables as Markdown."""
    pairs = [experiment(seed, tau) for tau in TAUS for seed in SEEDS]
    minima, starts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    names = [field.name for field in fields(Outcome)]
    rows = [
        (point, *astuple(outcome))
        for point, outcomes in (("minimum", minima), ("start", starts))
        for outcome in outcomes
    ]
    write_csv(folder / "theorem_3_5.csv", ["point", *names], rows)
    _draw(minima, folder / "theorem_3_5.png")
    return _summary(minima, starts)


def _share(held: list[bool]) -> str:
    return f"{sum(held)} of {len(held)}"


def _summary(minima: list[Outcome], starts: list[Outcome]) -> str:
    shares = [
        (
            tau,
            _share([o.holds for o in minima if o.tau == tau]),
            _share([o.holds for o in starts if o.tau == tau]),
            _share([o.holds_scaled for o in minima if o.tau == tau]),
        )
        for tau in TAUS
    ]
    columns = {
        "tau": "tau",
        "seed": "seed",
        "norm of theta": "theta_norm",
        "gradient norm": "gradient_norm",
        "left": "left",
        "right": "right",
        "holds": "holds",
        "image term": "image_term",
        "theta' (d2 L) theta": "bound_curvature",
    }
    sides = [[getattr(outcome, name) for name in columns.values()] for outcome in minima]
    return "\n\n".join(
        [
            "Seeds that satisfy the inequality:",
            markdown_table(
                ["tau", "at the minimum of L", "at the random start", "minimum, right side / tau"],
                shares,
            ),
            "Both sides at the minima; the left side is the distance between the last two columns:",
            markdown_table(list(columns), sides),
        ]
    )


def _draw(minima: list[Outcome], path: Path) -> None:
    figure, (panel,) = panels(1, width=4.4, height=3.6)
    for tau, colour in zip(TAUS, COLOURS, strict=False):
        chosen = [outcome for outcome in minima if outcome.tau == tau]
        panel.scatter(
            [outcome.right for outcome in chosen],
            [outcome.left for outcome in chosen],
            s=18,
            color=colour,
            label=f"tau = {tau:g}: {_share([o.holds for o in chosen])} satisfy it",
        )
    ends = [min(o.right for o in minima), max(o.right for o in minima)]
    panel.plot(ends, ends, color="#63696f", linewidth=0.8, label="left = right")
    panel.set(xscale="log", yscale="log")
    label(panel, title="Theorem 3.5 at minima of L, 20 seeds", x="right side", y="left side")
    panel.legend(frameon=False, fontsize=8)
    save(figure, path)
