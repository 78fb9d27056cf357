import csv
import importlib
import math

import numpy as np
import pytest
import torch

from pipelines import experiments as figures
from pipelines.config import UserError
from pipelines.experiments import proposition_3_6, temperature_curve, theorem_3_2, theorem_3_5
from pipelines.experiments.derivatives import hessian
from pipelines.ood import delta_energy_bound
from pipelines.plots import markdown_table, write_csv


def second_differences(function, theta, step=1e-4):
    """Hessian by central differences of values alone."""
    size = len(theta)
    result = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            total = 0.0
            for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                moved = theta.clone()
                moved[i] += a * step
                moved[j] += b * step
                total += a * b * float(function(moved))
            result[i, j] = total / (4 * step * step)
    return result


def text_features(text, theta):
    """The text map again, in numpy loops."""
    prototypes, offsets, inner, outer = (
        value.numpy() for value in (text.prototypes, text.offsets, text.weight_in, text.weight_out)
    )
    rows = []
    for k in range(len(prototypes)):
        hidden = [math.sin(inner[h] @ theta + offsets[k, h]) for h in range(len(inner))]
        row = prototypes[k] + outer @ np.array(hidden)
        rows.append(row / math.sqrt(row @ row))
    return np.array(rows)


def risk(features, texts, labels, tau):
    """Cross-entropy in numpy."""
    total = 0.0
    for row, label in zip(features @ texts.T / tau, labels, strict=True):
        total += math.log(sum(math.exp(value) for value in row)) - row[label]
    return total / len(features)


@pytest.fixture(scope="module", params=[(0, 1.0), (7, 0.1)], ids=["tau 1", "tau 0.1"])
def minimum(request):
    seed, tau = request.param
    problem = theorem_3_5.make_problem(seed, tau)
    theta = theorem_3_5.minimise(problem.bound, problem.start)
    return problem, theta, theorem_3_5.judge(problem, theta, seed)


def test_hessians_equal_finite_differences(minimum):
    problem, theta, _ = minimum
    for features in (problem.images, problem.masked):
        exact = hessian(lambda at, z=features: problem.risk(z, at))(theta)

        def by_hand(at, z=features):
            texts = text_features(problem.text, at.numpy())
            return risk(z.numpy(), texts, problem.labels.tolist(), problem.tau)

        differences = second_differences(by_hand, theta)
        assert np.allclose(exact.numpy(), differences, rtol=1e-4, atol=1e-5 * exact.abs().max())


def test_both_sides_follow_from_finite_differences(minimum):
    problem, theta, outcome = minimum
    labels, step = problem.labels.tolist(), 1e-4

    def along(function):
        """Second derivative along theta: theta' (d2 f) theta."""
        at = theta.numpy()
        up, here, down = (np.asarray(function(at * (1 + a * step))) for a in (1, 0, -1))
        return (up - 2 * here + down) / step**2

    def risk_of(features):
        return lambda at: risk(
            features.numpy(), text_features(problem.text, at), labels, problem.tau
        )

    left = abs(along(risk_of(problem.images)) - along(risk_of(problem.masked)))
    assert outcome.left == pytest.approx(float(left), rel=1e-3, abs=1e-4)
    bend = along(lambda at: text_features(problem.text, at))[labels]
    gap = (problem.images - problem.masked).numpy()
    right = np.linalg.norm(gap, axis=1).max() * np.linalg.norm(bend, axis=1).mean()
    assert outcome.right == pytest.approx(float(right), rel=1e-4)
    image_term = -(gap * bend).sum(axis=1).mean() / problem.tau
    assert outcome.image_term == pytest.approx(float(image_term), rel=1e-3, abs=1e-4)


def test_the_left_side_is_the_difference_of_its_two_terms(minimum):
    _, _, outcome = minimum
    assert outcome.left == pytest.approx(
        abs(outcome.image_term - outcome.bound_curvature), rel=1e-9
    )
    assert outcome.holds == (outcome.left <= outcome.right)


def test_the_point_is_a_local_minimum_away_from_zero(minimum):
    problem, theta, outcome = minimum
    assert outcome.gradient_norm < 1e-6
    assert outcome.least_curvature > 0
    assert outcome.theta_norm > 1
    value = float(problem.bound(theta))
    assert value < float(problem.bound(problem.start))
    nearby = torch.randn(20, len(theta), generator=torch.Generator().manual_seed(0)).double()
    assert all(float(problem.bound(theta + 1e-3 * step)) > value for step in nearby)


def test_masks_are_those_of_the_loss():
    problem = theorem_3_5.make_problem(3, 0.5)
    texts = problem.text(problem.start)
    loss = delta_energy_bound(
        problem.images, texts, problem.labels, problem.tau, theorem_3_5.KEEP, "image"
    )
    assert float(problem.bound(problem.start)) == pytest.approx(float(loss), rel=1e-12)


def test_a_loss_without_a_minimum_is_said_so():
    with pytest.raises(RuntimeError, match="no local minimum within 500 steps"):
        theorem_3_5.minimise(lambda theta: theta.sum(), torch.zeros(2, dtype=torch.float64))


def test_counter_examples_are_what_they_claim():
    for claim, id_row, ood_row, tau, c in theorem_3_2.COUNTER_EXAMPLES:
        assert max(id_row) > max(ood_row)
        rows = (torch.tensor([row], dtype=torch.float64) for row in (id_row, ood_row))
        delta, other = theorem_3_2.gains(*rows, tau, c)
        if claim.startswith("1"):
            assert float(delta) < 0
        else:
            assert sorted(id_row)[:-1] == sorted(ood_row)[:-1]
            assert float(delta) < float(other)


def test_failures_count_pairs():
    known = torch.tensor([[0.31, 0.30, 0.30], [0.2, 0.0, 0.0]], dtype=torch.float64)
    unknown = torch.tensor([[0.30, 0.0, 0.0], [0.1, 0.0, 0.0]], dtype=torch.float64)
    # pairs with the larger top on the ID side: (0, 0), (0, 1), (1, 1); the first two break claim 1
    one, two = theorem_3_2.failures(known, unknown, 0.1, 1)
    assert one == pytest.approx(2 / 3)
    assert two == pytest.approx(
        np.mean([
            float(a <= b)
            for i, j in ((0, 0), (0, 1), (1, 1))
            for a, b in zip(*theorem_3_2.gains(known[[i]], unknown[[j]], 0.1, 1), strict=True)
        ])
    )  # fmt: skip


def test_network_logits_are_the_networks_own():
    from sklearn.neural_network import MLPClassifier

    from pipelines.experiments.digit_pixels import pixels

    images, labels = pixels(range(6), "train")
    assert images.shape == (len(labels), 64)
    assert set(labels.tolist()) == set(range(6))
    (logits,) = temperature_curve.trained_logits(0, images[:50])
    network = MLPClassifier((64,), max_iter=1000, random_state=0).fit(images, labels)
    expected = network.predict_proba(images[:50].numpy())
    assert np.allclose(logits.softmax(dim=1).numpy(), expected, rtol=1e-9)


def test_displacements_reach_the_edge_of_the_set():
    directions = torch.eye(3, dtype=torch.float64)
    theta = torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64)

    def bowl(at):
        return 2 * (at - theta).square().sum()

    steps = proposition_3_6.displacements(bowl, theta, directions)
    rises = torch.stack([bowl(theta + step) for step in steps])
    assert (rises <= proposition_3_6.RISE).all()
    assert (rises > 0.8 * proposition_3_6.RISE).all()


def test_proposition_judges_every_target(monkeypatch):
    monkeypatch.setattr(proposition_3_6, "_STEPS", 20)
    domain, labels = proposition_3_6.domains()
    assert all(torch.allclose(z.norm(dim=1), torch.ones(()).double()) for z in domain.values())
    outcomes = proposition_3_6.judge(0.1, 0, domain, labels)
    assert [outcome.target for outcome in outcomes] == list(proposition_3_6.TARGETS)
    for outcome in outcomes:
        gap = abs(outcome.target_risk - outcome.source_risk)
        assert outcome.risk_gap == pytest.approx(gap, rel=1e-9)
        assert outcome.right > outcome.risk_gap
        assert 0 < outcome.feature_distance <= 2


def test_every_figure_has_a_module_that_runs():
    assert "theorem_3_5" in figures.FIGURES
    for module in figures.FIGURES.values():
        assert callable(importlib.import_module(module).run)


def test_run_writes_table_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(theorem_3_5, "SEEDS", range(2))
    summary = figures.run("theorem_3_5", tmp_path)
    assert "| 1 | 2 of 2 |" in summary
    with (tmp_path / "theorem_3_5.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2  # points, temperatures, seeds
    assert all(float(row["left"]) >= 0 for row in rows)
    assert (tmp_path / "theorem_3_5.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_figure_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="figure=theorem_9: no such figure; allowed: theorem_3_2"):
        figures.run("theorem_9", tmp_path)


def test_tables_round_and_name(tmp_path):
    assert (
        markdown_table(["a", "b"], [[1.23456, True]]) == "| a | b |\n| --- | --- |\n| 1.23 | yes |"
    )
    write_csv(tmp_path / "t.csv", ["a", "b"], [[1 / 3, "x"]])
    assert (tmp_path / "t.csv").read_text() == "a,b\n0.3333333,x\n"
