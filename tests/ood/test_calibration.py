"""Temperature scaling against scipy's own minimiser of the loss, and where it has no minimum."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from pipelines.ood.calibration import HIGHEST, LOWEST, fit_temperature


def sample(seed, scale):
    """Labels drawn from the softmax of logits, which are then multiplied by `scale`."""
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(4000, 6))
    gumbel = random.gumbel(size=logits.shape)
    return scale * logits, (logits + gumbel).argmax(axis=1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_it_minimises_the_loss_and_finds_the_scale_of_the_logits(scale):
    logits, labels = sample(3, scale)
    found = fit_temperature(logits, labels)

    def loss(log_temperature):
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[
            np.arange(len(labels)), labels
        ].mean()

    best = minimize_scalar(loss, bracket=(np.log(scale) - 1, np.log(scale) + 1), tol=1e-12)
    assert found == pytest.approx(np.exp(best.x), rel=1e-6)
    assert found == pytest.approx(scale, rel=0.1)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(found, rel=1e-5)
    assert fit_temperature(logits + 5.0, labels) == pytest.approx(found, rel=1e-6)


def test_where_there_is_no_best_temperature_it_is_a_bound():
    logits, labels = np.eye(3), np.arange(3)
    assert fit_temperature(logits, labels) == LOWEST
    assert fit_temperature(-logits, labels) == HIGHEST
    for bad in ((np.empty((0, 3)), np.empty(0, int)), (logits, np.arange(2)), (logits, [0, 1, 3])):
        with pytest.raises(ValueError, match=r"rows of logits|labels"):
            fit_temperature(bad[0], np.asarray(bad[1]))
