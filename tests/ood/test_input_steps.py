"""Input steps against differences of the score, and ODIN against a loop in plain Python."""

import math

import numpy as np
import pytest
import pytorch_ood.detector
import torch

from pipelines.ood import FITTED_SCORES, ODIN, Mahalanobis, odin, odin_perturb, step_up
from tests.ood import oracles


def layer(classes=4, dim=6):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return weight, torch.randn(classes, generator=generator, dtype=torch.float64)


def rows(number=40, dim=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(number, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("tau", [1.0, 1000.0])
def test_odin_is_the_softmax_of_the_layers_logits(tau):
    weight, bias = layer()
    logits = (rows() @ weight.T + bias).tolist()
    expected = [oracles.odin(row, tau) for row in logits]
    found = FITTED_SCORES["odin"].fit({"weight": weight, "bias": bias}, tau=tau)
    np.testing.assert_allclose(found(rows()), expected, rtol=1e-12)
    np.testing.assert_allclose(odin(np.array(logits), tau), expected, rtol=1e-12)
    np.testing.assert_allclose(found.differentiable(rows()).exp(), expected, rtol=1e-12)


def test_odin_without_an_offset_and_its_mistakes():
    weight, _ = layer()
    assert torch.equal(ODIN.fit(weight)(rows()), ODIN.fit(weight, torch.zeros(4))(rows()))
    assert ODIN.fit(weight).tau == 1000.0
    with pytest.raises(ValueError, match="tau must be"):
        ODIN.fit(weight, tau=0.0)


def test_what_has_the_gradient_is_the_mahalanobis_score():
    labels = torch.arange(40) % 3
    record = Mahalanobis.fit(rows() + labels[:, None], labels)
    inputs = rows().requires_grad_()
    score = record.differentiable(inputs)
    np.testing.assert_allclose(score.detach(), record(rows()), rtol=1e-12)
    (slope,) = torch.autograd.grad(score.sum(), inputs)
    small = torch.zeros(6, dtype=torch.float64)
    small[2] = 1e-6
    rise = (record(rows() + small) - record(rows() - small)) / 2e-6
    np.testing.assert_allclose(slope[:, 2], rise, rtol=1e-6)


class Network(torch.nn.Module):
    """Smooth features of images (N, 3, 2, 2), and a linear layer on them, in float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.mix = torch.nn.Parameter(torch.randn(12, 6, generator=generator, dtype=torch.float64))
        self.weight, self.bias = layer()

    def features(self, images):
        return torch.tanh(images.flatten(1) @ self.mix)

    def forward(self, images):
        return self.features(images) @ self.weight.T + self.bias


def pictures(number=30):
    generator = torch.Generator().manual_seed(8)
    return torch.rand(number, 3, 2, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("eps", "tau"), [(0.0014, 1000.0), (0.05, 2.0)])
def test_odin_is_that_of_pytorch_ood(eps, tau):
    network = Network()
    expected = -pytorch_ood.detector.ODIN(network, eps=eps, temperature=tau).predict(pictures())
    record = ODIN.fit(network.weight, network.bias, tau=tau)
    moved = step_up(pictures(), lambda x: record.differentiable(network.features(x)), eps)
    with torch.no_grad():
        np.testing.assert_allclose(record(network.features(moved)), expected, rtol=1e-12)


def test_the_moved_mahalanobis_is_that_of_pytorch_ood():
    network, labels, eps = Network(), torch.arange(30) % 3, 0.02
    known = network.features(pictures()).detach()
    theirs = pytorch_ood.detector.MahalanobisODIN(network.features, eps=eps)
    theirs.fit_features(known.float(), labels)  # it keeps float32
    theirs._base.mu, theirs._base.precision = (
        theirs._base.mu.double(),
        theirs._base.precision.double(),
    )
    others = pictures(50)[30:]
    # Half of the distance, by a covariance that is not divided by the number of rows.
    expected = -2 * 30 * theirs.predict(others)
    record = Mahalanobis.fit(known, labels)
    moved = step_up(others, lambda x: record.differentiable(network.features(x)), eps)
    with torch.no_grad():
        found = record(network.features(moved))
    np.testing.assert_allclose(found, expected.detach(), rtol=2e-3)


def test_an_image_without_a_slope_stays_where_it_is():
    images = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    broken = torch.tensor([math.nan, 1.0])
    moved = step_up(images, lambda x: x.sum(dim=1) * broken, 0.5)
    assert moved.tolist() == [[1.0, 2.0], [3.5, 4.5]]


def odin_model():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    images = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    return images, lambda x: torch.tanh(x.flatten(1)) @ weight


def test_odin_steps_up_the_probability_of_the_predicted_class():
    images, logits_fn = odin_model()
    tau, eps, step = 10.0, 0.01, 1e-6

    def log_probability(x):
        return math.log(oracles.msp(logits_fn(x[None])[0].tolist(), tau))

    expected = images.clone()
    for i in range(len(images)):
        for index in np.ndindex(*images.shape[1:]):
            up, down = images[i].clone(), images[i].clone()
            up[index] += step
            down[index] -= step
            slope = log_probability(up) - log_probability(down)
            expected[i][index] = images[i][index] - eps * -math.copysign(1.0, slope)
    moved = odin_perturb(images, logits_fn, eps, tau)
    assert torch.equal(moved, expected)
    assert (odin(logits_fn(moved), tau) > odin(logits_fn(images), tau)).all()


def test_odin_enables_gradients_by_itself_and_leaks_none():
    images, logits_fn = odin_model()
    expected = odin_perturb(images, logits_fn, 0.01)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(odin_perturb(images.clone(), logits_fn, 0.01), expected)
    assert not expected.requires_grad
    assert not images.requires_grad
    assert torch.equal(odin_perturb(images, logits_fn, 0.0), images)
    with pytest.raises(ValueError, match="eps must be a finite number >= 0"):
        odin_perturb(images, logits_fn, -0.1)
