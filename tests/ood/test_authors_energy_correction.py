"""Lafon 2022 as the authors' own code computes it, on fixed inputs in float64.

The values come from one run of the public repository MarcLafon/heatood (its energy model, its
sampler, its contrastive loss; torch's Adam with its settings) on inputs that are sines of the
index, so that anybody can make them again. What was given to it: a network from 4 to 3 to 1 whose
inner layer of 3 to 3 is one layer applied four times (`n_hidden_layers: 4`), T = 0.5, T_G = 2, a
mixture of two unit Gaussians, 5 steps of SGLD, and the draws of every random number. Its noise is
subtracted, ours is added: the draws have opposite signs.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from pipelines.ood.energy_correction import EBM, Network, correction_loss, projected, sgld

ENERGIES = [1.197953412, 1.113639136, 1.11938614, 1.140366147, 1.262845913, 1.359356798]
SCHEDULE = [0.1, 0.0676, 0.0424, 0.0244, 0.0136]
# After the chains' last step, and the starts as they enter the loss.
ENDS = [
    [0.5635691511, 0.6296099381, 0.4907866837, 0.2123901336],
    [0.04874336686, 0.01417988486, 0.01688541865, 0.9985679234],
    [0.3540061847, 0.5646228067, 0.599764405, 0.4429033368],
    [0.9997732451, 0.006475715454, 0.01029866258, 0.0174774451],
    [0.1176379514, 0.4169846795, 0.6265746181, 0.6478343441],
    [0.8854904554, 0.463232301, 0.03349014973, 0.0141738706],
]
STARTS = [
    [0.5589924455, 0.6172365688, 0.4946157709, 0.2488005289],
    [0.0, 0.0, 0.0, 1.0],
    [0.3431646006, 0.5460405018, 0.5983398118, 0.4754653477],
    [1.0, 0.0, 0.0, 0.0],
    [0.1024814706, 0.3931367095, 0.6185076918, 0.6725989229],
    [0.8993157032, 0.4372999725, 0.0, 0.0],
]
LOSS = 0.8621529562
# Of the three layers' weights, one after the other.
GRADIENTS = [
    0.151388458,
    0.1727741702,
    0.1175107949,
    0.09695087762,
    0.01777968987,
    0.04458072278,
    0.03423855557,
    0.02815714128,
    0.2139454843,
    0.2234448101,
    0.1486317132,
    0.1227044341,
    1.451942721,
    1.408755471,
    -0.06772097107,
    1.805176716,
    2.27091714,
    -0.3359163248,
    0.2618815789,
    0.4130061989,
    -0.08922499643,
    1.303120175,
    2.096979755,
    -0.4210993562,
]
# After one step of Adam at a rate of 0.01 with betas (0, 0.999): the weights, then the biases.
AFTER_ADAM = [
    -0.009999999339,
    0.5697959191,
    0.8769047578,
    0.766888431,
    0.2914893408,
    -0.3257049027,
    -0.7944181923,
    -0.8942073478,
    -0.5781399736,
    0.005132510883,
    0.5812879395,
    0.8793514113,
    0.07985007505,
    0.6356204819,
    0.9077454865,
    0.7176467635,
    0.2053243963,
    -0.3882683993,
    -0.8345493427,
    -0.873031847,
    -0.4856169895,
    0.1688023978,
    0.6949942187,
    0.9096162425,
    -0.009999999649,
    0.1188435392,
    0.1870899463,
    0.0678836685,
    0.168241472,
    0.1847695263,
    0.1334712182,
]


def wave(*shape: int, scale: float = 1.0, phase: float = 0.0) -> torch.Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(index * 0.7 + phase).reshape(shape)


REAL = torch.nn.functional.normalize(wave(6, 4, phase=2.0).abs(), dim=1)
SETTINGS = replace(
    EBM, steps=5, step_size=(0.1, 0.01), noise=(0.05, 0.005), decay="quadratic", betas=(0.0, 0.999)
)


def network() -> Network:
    shapes = (3, 4), (3, 3), (1, 3)
    weights = [wave(*shape, scale=0.9, phase=0.1 * k) for k, shape in enumerate(shapes)]
    biases = [wave(shape[0], scale=0.2, phase=0.4 * k) for k, shape in enumerate(shapes)]
    return Network(tuple(weights), tuple(biases), repeats=4)


def energy(rows: torch.Tensor) -> torch.Tensor:
    """E_theta / T + E_G / T_G."""
    squared = ((rows[:, None] - wave(2, 4, phase=0.3)) ** 2).sum(-1)
    return network()(rows) / 0.5 - torch.logsumexp(-0.5 * squared, dim=1) / 2


def chains() -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and ends of the chains."""
    draws = iter([-wave(6, 4, phase=3.0 + step) for step in range(5)])
    start = projected(wave(6, 4, phase=1.0) + 0.6, "positive_sphere")
    end = sgld(
        energy, start, *SETTINGS.schedule(), normal=lambda: next(draws), project="positive_sphere"
    )
    return start, end


def test_energies_of_six_layers_of_which_four_are_one() -> None:
    np.testing.assert_allclose(network()(REAL) / 0.5, ENERGIES, rtol=1e-9)


def test_the_quadratic_decay() -> None:
    step_sizes, noise = SETTINGS.schedule()
    np.testing.assert_allclose(step_sizes, SCHEDULE, rtol=1e-9)
    np.testing.assert_allclose(noise, np.array(SCHEDULE) / 2, rtol=1e-9)


def test_chains_on_the_positive_sphere() -> None:
    start, end = chains()
    np.testing.assert_allclose(start, STARTS, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(end, ENDS, rtol=1e-8, atol=1e-10)


def test_loss_gradients_and_a_step_of_adam_with_the_starts_among_the_negatives() -> None:
    start, end = chains()
    model = network()
    for parameter in model.parameters:
        parameter.requires_grad_()
    noise = torch.cat([wave(6, 4, phase=20.0), wave(12, 4, phase=30.0)])
    inputs = torch.cat([REAL, end, start]) + 0.02 * noise
    energies = (model(inputs) / 0.5).reshape(3, 6)
    loss = correction_loss(energies[0], energies[1:], l2_weight=0.3)
    np.testing.assert_allclose(loss.detach(), LOSS, rtol=1e-8)
    loss.backward()
    gradients = torch.cat([w.grad.flatten() for w in model.weights if w.grad is not None])
    np.testing.assert_allclose(gradients, GRADIENTS, rtol=1e-7)
    torch.optim.Adam(model.parameters, lr=0.01, betas=SETTINGS.betas).step()
    after = torch.cat([p.detach().flatten() for p in model.parameters])
    np.testing.assert_allclose(after, AFTER_ADAM, rtol=1e-7)
