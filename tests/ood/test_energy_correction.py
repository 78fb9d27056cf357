"""The energy-correction model against plain loops, finite differences and closed forms."""

import io
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.ood.density import SSD, GaussianMixture
from pipelines.ood.energy_correction import (
    CORRECTION,
    EBM,
    EnergyCorrection,
    EnergySettings,
    FeatureEBM,
    Network,
    correction_loss,
    projected,
    scaled,
    sgld,
)
from pipelines.ood.energy_training import Alone, Diverged, EnergyTrainer, TrainerState, train
from pipelines.ood.records import move, record_from_state, record_state
from pipelines.ood.statistics import ClassStatistics
from tests.patience import PATIENCE

SMALL = EnergySettings(
    T_G=4.0,
    l2_weight=0.5,
    steps=5,
    step_size=(1e-2, 1e-3),
    noise=(0.1, 0.01),
    input_noise=0.01,
    epochs=2,
    batch_size=32,
    lr=1e-3,
    width=16,
    hidden=3,
)
SMALL_EBM = replace(SMALL, reference=False, T=0.5)
# What the authors' later code does otherwise than the paper's text.
SMALL_CODE = replace(
    SMALL,
    decay="quadratic",
    betas=(0.0, 0.999),
    starts_are_negatives=True,
    project="positive_sphere",
)


def clusters(num_rows=90, num_columns=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(3, num_columns, generator=generator, dtype=dtype)
    labels = torch.arange(num_rows) % 3
    noise = torch.randn(num_rows, num_columns, generator=generator, dtype=dtype)
    return means[labels] + 0.4 * noise, labels


def network(num_columns=5, seed=0, dtype=torch.float64, **options):
    made = Network.random(
        num_columns, torch.Generator().manual_seed(seed), **{"width": 8, "hidden": 3, **options}
    )
    return move(made, dtype)


def loop_network(made, row):
    """One row's energy, a sum at a time."""
    layers = list(zip(made.weights, made.biases, strict=True))
    inner = [layer for layer in layers[1:-1] for _ in range(made.repeats)]
    values = [float(v) for v in row]
    for weight, bias in [layers[0], *inner]:
        sums = [
            sum(w * v for w, v in zip(ws, values, strict=True)) + b
            for ws, b in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
        values = [v if v > 0 else 0.2 * v for v in sums]
    weight, bias = layers[-1]
    last = sum(w * v for w, v in zip(weight[0].tolist(), values, strict=True))
    return last + float(bias)


def fixed_noise(*draws):
    left = [torch.tensor(draw, dtype=torch.float64) for draw in draws]
    return lambda: left.pop(0)


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"hidden": 1}, {"hidden": 4}])
def test_the_network_equals_plain_sums(options):
    made, rows = network(**options), clusters(7, dtype=torch.float64)[0]
    expected = [loop_network(made, row) for row in rows]
    np.testing.assert_allclose(made(rows), expected, rtol=1e-12)
    hidden = options.get("hidden", 3)
    assert len(made.weights) == (3 if options.get("shared") else hidden + 1)
    assert made.repeats == (hidden - 1 if options.get("shared") else 1)


def test_the_papers_network_has_six_linear_layers():
    """Lafon 2022, section 3.2; the "4 hidden layers" of A.5.1 are those from 1024 to 1024."""
    made = Network.random(512, torch.Generator().manual_seed(0))
    shapes = [tuple(weight.shape) for weight in made.weights]
    assert shapes == [(1024, 512), *[(1024, 1024)] * 4, (1, 1024)]
    for weight, bias in zip(made.weights, made.biases, strict=True):
        bound = 1 / math.sqrt(weight.shape[1])
        assert float(weight.abs().max()) <= bound
        assert float(bias.abs().max()) <= bound
        if weight.numel() > 2000:
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_sgld_by_hand_with_decoupled_step_and_noise():
    # E(x, y) = x^2 + x y + 2 y^2, gradient (2x + y, x + 4y).
    start = torch.tensor([[1.0, -1.0], [0.0, 2.0]], dtype=torch.float64)
    draws = [[[1.0, 0.0], [-1.0, 2.0]], [[0.5, 0.5], [0.0, -1.0]]]
    step_sizes, stds = [0.1, 0.01], [0.3, 0.02]
    expected = []
    for chain in range(2):
        x, y = start[chain].tolist()
        for a, n, draw in zip(step_sizes, stds, draws, strict=True):
            gx, gy = 2 * x + y, x + 4 * y
            x, y = x - a * gx + n * draw[chain][0], y - a * gy + n * draw[chain][1]
        expected.append([x, y])
    end = sgld(
        lambda z: z[:, 0] ** 2 + z[:, 0] * z[:, 1] + 2 * z[:, 1] ** 2,
        start,
        torch.tensor(step_sizes),
        torch.tensor(stds),
        normal=fixed_noise(*draws),
    )
    np.testing.assert_allclose(end, expected, rtol=1e-6)  # a_t and n_t come as float32 here
    assert not end.requires_grad
    assert start.tolist() == [[1.0, -1.0], [0.0, 2.0]]


def test_sgld_puts_rows_back_to_the_sphere_after_every_step():
    start = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    end = sgld(
        lambda z: z[:, 0],
        start,
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.zeros(2),
        normal=lambda: torch.zeros(1, 2, dtype=torch.float64),
        project="sphere",
    )
    x, y = 0.6, 0.8
    for _ in range(2):
        x -= 0.5
        x, y = x / math.hypot(x, y), y / math.hypot(x, y)
    np.testing.assert_allclose(end[0], [x, y], rtol=1e-12)


def test_a_row_without_a_positive_entry_is_put_to_zero():
    rows = projected(torch.tensor([[3.0, -1.0, 4.0], [-1.0, -2.0, 0.0]]), "positive_sphere")
    assert rows.flatten().tolist() == pytest.approx([0.6, 0, 0.8, 0, 0, 0])


@pytest.mark.parametrize("a", [0.1, 0.5])
def test_sgld_with_coupled_noise_samples_a_gaussian_up_to_its_known_bias(a):
    """n^2 = 2 a on E = |z - mu|^2 / 2: mean mu and variance 1 / (1 - a / 2)."""
    generator, chains, mean = torch.Generator().manual_seed(0), 40_000, torch.tensor([1.5, -0.5])
    steps = math.ceil(14 / a)  # (1 - a)^steps is far below the Monte-Carlo error
    end = sgld(
        lambda z: 0.5 * (z - mean).square().sum(dim=1),
        torch.zeros(chains, 2),
        torch.full((steps,), a),
        torch.full((steps,), math.sqrt(2 * a)),
        normal=lambda: torch.randn(chains, 2, generator=generator),
    )
    variance = 1 / (1 - a / 2)
    error = math.sqrt(variance / chains)
    assert (end.mean(dim=0) - mean).abs().max() < 4 * error
    assert (end.var(dim=0) / variance - 1).abs().max() < 4 * math.sqrt(2 / chains)
    # So far from 1 that the bias itself is seen, not only the Gaussian.
    assert abs(variance - 1) > 4 * math.sqrt(2 / chains)


def test_each_chain_follows_its_own_gradient():
    made, rows = network(), clusters(6, dtype=torch.float64)[0]
    step_sizes, stds = torch.full((4,), 0.1), torch.zeros(4)

    def run(part):
        zero = torch.zeros_like(part)
        return sgld(made, part, step_sizes, stds, normal=lambda: zero)

    alone = torch.cat([run(rows[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(run(rows), alone, rtol=1e-12, atol=1e-12)


def test_the_loss_by_hand_and_in_parts():
    real, sampled = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    expected = -0.5 - 1.75 + 0.3 * (2.5 + 4.625)
    assert float(correction_loss(real, sampled, 0.3)) == pytest.approx(expected)
    parts = [correction_loss(real[i : i + 1], sampled[i : i + 1], 0.3, count=2) for i in (0, 1)]
    assert float(sum(parts)) == pytest.approx(expected)


def test_the_loss_is_least_at_the_scaled_density_ratio():
    """Pointwise, e* = -(p - q) / (2 alpha (p + q)): within +-1 / (2 alpha), 0 where p = q."""
    p, q, alpha = [0.6, 0.3, 0.1, 0.0], [0.2, 0.3, 0.1, 0.4], 2.0
    counts = [[round(10 * v) for v in side] for side in (p, q)]
    energy = torch.tensor(
        [-(a - b) / (2 * alpha * (a + b)) for a, b in zip(p, q, strict=True)], requires_grad=True
    )
    rows = [torch.repeat_interleave(torch.arange(4), torch.tensor(c)) for c in counts]
    loss = correction_loss(energy[rows[0]], energy[rows[1]], alpha)
    (gradient,) = torch.autograd.grad(loss, energy)
    assert gradient.abs().max() < 1e-7
    assert energy.abs().max() <= 1 / (2 * alpha)


def test_the_gradient_of_the_loss_equals_finite_differences_with_samples_held_fixed():
    rows = clusters(12, dtype=torch.float64)[0]
    real, sampled, made = rows[:6], rows[6:] + 0.3, network()

    def loss(parameters):
        model = made.with_parameters(parameters)
        return correction_loss(model(real) / 0.7, model(sampled) / 0.7, 0.4)

    parameters = [p.clone().requires_grad_() for p in made.parameters]
    gradients = torch.autograd.grad(loss(parameters), parameters)
    step = 1e-6
    for place, parameter in enumerate(parameters):
        flat = parameter.detach().flatten()
        for entry in range(0, len(flat), max(1, len(flat) // 5)):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[entry] += sign * step
                changed = [p.detach() for p in parameters]
                changed[place] = moved.view_as(parameter)
                ends.append(float(loss(changed)))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(gradients[place].flatten()[entry]) == pytest.approx(
                slope, rel=1e-5, abs=1e-8
            )


@pytest.mark.parametrize("starts_are_negatives", [False, True])
def test_the_trainers_update_is_adams_on_that_gradient(starts_are_negatives):
    """The first Adam step moves every weight by lr against the sign of its gradient."""
    features, labels = clusters(dtype=torch.float64)
    mixture = GaussianMixture.fit(features, labels)
    settings = replace(
        SMALL, batch_size=90, input_noise=0.0, epochs=1, starts_are_negatives=starts_are_negatives
    )
    trainer = EnergyTrainer(features, mixture, settings, seed=4)
    twin = EnergyTrainer(features, mixture, settings, seed=4)
    start, samples = twin.sample(90)
    parameters = [p.detach().clone().requires_grad_() for p in twin.network.parameters]
    model = twin.network.with_parameters(parameters)
    negatives = torch.cat([samples, start]) if starts_are_negatives else samples
    sampled = model(negatives)
    loss = model(features).mean() - sampled.mean()
    loss = loss + settings.l2_weight * (model(features).square().mean() + sampled.square().mean())
    gradients = torch.autograd.grad(loss, parameters)
    trainer.epoch()
    for after, before, gradient in zip(
        trainer.network.parameters, parameters, gradients, strict=True
    ):
        sure = gradient.abs() > 1e-5  # Adam's eps is 1e-8
        expected = before - settings.lr * gradient.sign()
        torch.testing.assert_close(after[sure], expected[sure], rtol=0, atol=2e-3 * settings.lr)


def loop_mixture_energy(gaussians, row, weighted):
    covariance = (gaussians.spread.T @ gaussians.spread).numpy()
    precision = np.linalg.inv(covariance)
    total = 0.0
    for mean, share in zip(gaussians.means.numpy(), gaussians.log_prior.exp(), strict=True):
        delta = np.asarray(row) - mean
        total += (float(share) if weighted else 1.0) * math.exp(-delta @ precision @ delta)
    return -math.log(total)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_score_is_minus_both_energies_over_their_temperatures(weighted, normalize):
    features, labels = clusters(dtype=torch.float64)
    mixture = GaussianMixture.fit(features, labels, T_G=7.0, weighted=weighted, normalize=normalize)
    model = EnergyCorrection(network(), mixture, T=0.3)
    queries = features[:8] + 0.1
    at = queries / queries.norm(dim=1, keepdim=True) if normalize else queries
    expected = [
        -(
            loop_network(model.network, row) / 0.3
            + loop_mixture_energy(mixture.gaussians, row, weighted) / 7
        )
        for row in at
    ]
    np.testing.assert_allclose(model(queries), expected, rtol=1e-9)
    alone = FeatureEBM(model.network, 0.3, normalize)
    expected = [-loop_network(model.network, row) / 0.3 for row in at]
    np.testing.assert_allclose(alone(queries), expected, rtol=1e-9)
    assert model(queries.float()).dtype == torch.float64


def test_without_a_network_the_model_is_the_mixture_and_ranks_as_ssd():
    features, labels = clusters(dtype=torch.float64)
    mixture = GaussianMixture.fit(features, labels, T_G=9.0, normalize=True)
    empty = network().with_parameters([torch.zeros_like(p) for p in network().parameters])
    model = EnergyCorrection(empty, mixture, T=1.0)
    queries = clusters(40, seed=5, dtype=torch.float64)[0]
    torch.testing.assert_close(model(queries), mixture(queries), rtol=1e-12, atol=1e-12)
    # Far from all but one component log-sum-exp is the max: SSD's distance over T_G.
    torch.testing.assert_close(
        model(queries), SSD.fit(features, labels)(queries) / 9, rtol=0, atol=math.log(3) / 9
    )


@pytest.mark.parametrize("settings", [SMALL, SMALL_EBM])
def test_a_seed_decides_everything(settings):
    features, labels = clusters()
    mixture = GaussianMixture.fit(features, labels)
    first, again, other = (train(features, mixture, settings, seed=seed) for seed in (3, 3, 4))
    assert first.history == again.history
    assert torch.equal(first.model(features), again.model(features))
    assert not torch.equal(first.model(features), other.model(features))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(features, mixture, replace(settings, epochs=1), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("settings", [SMALL, SMALL_EBM])
def test_float32_follows_float64(settings):
    features, labels = clusters()
    mixture = GaussianMixture.fit(features, labels)
    single = train(features, mixture, settings, seed=1)
    double = train(features.double(), mixture, settings, seed=1)
    torch.testing.assert_close(single.model(features), double.model(features), rtol=0, atol=2e-4)
    for one, two in zip(single.history, double.history, strict=True):
        for name, value in one.items():
            assert value == pytest.approx(two[name], rel=1e-3, abs=1e-4), name


def test_bfloat16_products_stay_near_float32():
    features, labels = clusters()
    mixture = GaussianMixture.fit(features, labels)
    full = train(features, mixture, SMALL, seed=1).model(features)
    half = train(features, mixture, replace(SMALL, precision="bf16"), seed=1).model(features)
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0, atol=0.02)


@pytest.mark.parametrize("settings", [SMALL, SMALL_EBM, SMALL_CODE])
def test_a_run_goes_on_from_its_state_to_the_same_bits(settings):
    features, labels = clusters()
    mixture = GaussianMixture.fit(features, labels)
    settings = replace(settings, epochs=3)
    kept = []

    def keep(trainer):
        file = io.BytesIO()
        torch.save(vars(trainer.state()), file)
        kept.append(file.getvalue())

    whole = train(features, mixture, settings, seed=2, on_epoch=keep)
    assert len(kept) == 3
    state = torch.load(io.BytesIO(kept[0]), weights_only=True)
    resumed = train(features, mixture, settings, seed=2, state=TrainerState(**state))
    assert resumed.history == whole.history
    assert torch.equal(resumed.model(features), whole.model(features))


class Threads:
    """Workers as threads of this process that add up what they hold."""

    def __init__(self, rank, world, barrier, board):
        self.rank, self.world, self.barrier, self.board = rank, world, barrier, board

    def part(self, count):
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def total(self, values):
        self.board[self.rank] = values
        self.barrier.wait(timeout=PATIENCE)
        result = sum(self.board[rank] for rank in range(self.world))
        self.barrier.wait(timeout=PATIENCE)
        return result

    def add_gradients(self, parameters):
        for parameter in parameters:
            parameter.grad = self.total(parameter.grad)


@pytest.mark.parametrize("settings", [SMALL, SMALL_EBM, SMALL_CODE])
def test_two_workers_equal_one(settings):
    features, labels = clusters(dtype=torch.float64)
    mixture = GaussianMixture.fit(features, labels)
    one = train(features, mixture, settings, seed=1, parallel=Alone())
    barrier, board, found = threading.Barrier(2), {}, {}

    def work(rank):
        parallel = Threads(rank, 2, barrier, board)
        found[rank] = train(features, mixture, settings, seed=1, parallel=parallel)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {0, 1}
    for trained in found.values():
        torch.testing.assert_close(
            trained.model(features), one.model(features), rtol=1e-6, atol=1e-9
        )
        for mine, whole in zip(trained.history, one.history, strict=True):
            assert mine == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("settings", [SMALL, SMALL_EBM])
def test_saved_and_loaded_models_give_identical_scores(settings):
    features, labels = clusters()
    model = train(features, GaussianMixture.fit(features, labels), settings).model
    content = safetensors.torch.save(record_state(model))
    again = record_from_state(type(model), safetensors.torch.load(content))
    assert torch.equal(again(features), model(features))
    state = {k: v for k, v in record_state(model).items() if not k.startswith("network")}
    with pytest.raises(ValueError, match="lacks weights"):
        record_from_state(type(model), state)


def ring(num_rows, generator):
    """Points on a circle, which no Gaussian follows: they leave its middle empty."""
    angle = 2 * math.pi * torch.rand(num_rows, generator=generator)
    radius = 2 + 0.1 * torch.randn(num_rows, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


@pytest.mark.parametrize("reference", [True, False])
def test_training_finds_what_the_mixture_cannot_say(reference):
    features = ring(512, torch.Generator().manual_seed(0))
    mixture = GaussianMixture.fit(features, torch.zeros(512, dtype=torch.long), T_G=2.0)
    settings = EnergySettings(
        reference=reference, T_G=2.0, l2_weight=0.05, steps=20, step_size=(0.05, 0.01),
        noise=(0.2, 0.05), input_noise=0.02, initial_std=1.5, epochs=25, batch_size=256, lr=3e-3,
        width=32,
    )  # fmt: skip
    trained = train(features, mixture, settings, seed=0)
    middle, far = torch.zeros(1, 2), torch.tensor([[6.0, 0.0]])
    score = trained.model(torch.cat([features[:100], middle, far]))
    assert float(mixture(middle)) > float(mixture(features[:100]).max())  # the mixture's mistake
    assert float(score[100]) < float(score[:100].median())
    assert float(score[101]) < float(score[:100].median())
    last = trained.history[-1]
    assert last["network/sampled"] > last["network/real"]
    assert last["coverage"] == 1.0


def test_the_report_of_an_epoch_measures_what_it_says():
    features, labels = clusters(dtype=torch.float64)
    mixture = GaussianMixture.fit(features, labels)
    settings = replace(SMALL, batch_size=90, input_noise=0.0, epochs=1)
    trainer = EnergyTrainer(features, mixture, settings, seed=7)
    twin = EnergyTrainer(features, mixture, settings, seed=7)
    start, samples = twin.sample(90)
    made = move(trainer.network.with_parameters([p.detach() for p in trainer.network.parameters]))
    real, sampled = ([loop_network(made, r) for r in rows] for rows in (features, samples))
    own, drawn = (
        [loop_mixture_energy(mixture.gaussians, r, weighted=False) / 4 for r in rows]
        for rows in (features, samples)
    )
    report = trainer.epoch()
    expected = {
        "epoch": 1.0,
        "network/real": np.mean(real),
        "network/sampled": np.mean(sampled),
        "energy/real": np.mean(real) + np.mean(own),
        "energy/sampled": np.mean(sampled) + np.mean(drawn),
        "drift": np.mean([math.dist(a, b) for a, b in zip(start, samples, strict=True)]),
        "norm/real": np.mean([math.hypot(*row) for row in features.tolist()]),
        "norm/sampled": np.mean([math.hypot(*row) for row in samples.tolist()]),
        "norm/start": np.mean([math.hypot(*row) for row in start.tolist()]),
        "loss": np.mean(real)
        - np.mean(sampled)
        + 0.5 * (np.mean(np.square(real)) + np.mean(np.square(sampled))),
        "coverage": 1.0,
    }
    assert report == pytest.approx(expected, rel=1e-8)
    assert trainer.history == [report]


def test_coverage_is_the_share_of_components_that_samples_come_near():
    features, labels = clusters()
    mixture = GaussianMixture.fit(features, labels)
    # Chains that stay at the first class's mean, or far from all.
    still = replace(SMALL_EBM, step_size=(0.0, 0.0), noise=(0.0, 0.0), initial_std=0.0, epochs=1)
    first = features[labels == 0].mean(dim=0)
    for offset, expected in ((first, 1 / 3), (first + 1000, 0.0)):
        moved = GaussianMixture.fit(features - offset, labels)
        assert train(features - offset, moved, still).history[0]["coverage"] == pytest.approx(
            expected
        )
    assert train(features, mixture, replace(SMALL, epochs=1)).history[0]["coverage"] == 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lr": 1e6}, "network/|loss"),
        ({"lr": 1e30}, "loss is (nan|-?inf)"),
        ({"step_size": (1e30, 1e30)}, "samples have length|loss is"),
        ({"noise": (1e4, 1e4), "l2_weight": 0.0}, "samples have length"),
    ],
)
def test_divergence_stops_with_what_to_change(change, reason):
    features, labels = clusters()
    mixture = GaussianMixture.fit(features, labels)
    settings = replace(SMALL, epochs=5, **change)
    with pytest.raises(Diverged, match=rf"diverged in epoch \d: .*({reason}).*try a smaller lr"):
        train(features, mixture, settings)


@pytest.mark.parametrize("settings", [SMALL, SMALL_EBM])
def test_fewer_samples_than_dimensions_train_and_score(settings):
    features, labels = clusters(24, 40)
    mixture = GaussianMixture.fit(features, labels, normalize=True)
    trained = train(features, mixture, settings)
    assert torch.isfinite(trained.model(features)).all()
    statistics = ClassStatistics.from_batch(features, labels, num_classes=3, normalize=True)
    adapted = scaled(CORRECTION, statistics, mixture)
    # Shrinkage makes distances shorter than D, and the rule follows them.
    assert 0 < adapted.T_G < 1e3 * 40 / 512
    own = [
        float(d[label])
        for d, label in zip(
            mixture.gaussians.squared_distances(
                features.double() / features.double().norm(dim=1, keepdim=True)
            ),
            labels,
            strict=True,
        )
    ]
    assert pytest.approx(1e3 * np.mean(own) / 512) == adapted.T_G


def statistics_of(num_columns, spread, num_samples, mean_length):
    """Two classes with Sigma = spread^2 I, their means `mean_length` from zero."""
    means = np.zeros((2, num_columns))
    means[0, 0] = means[1, 1] = mean_length
    scatter = num_samples * spread**2 * np.eye(num_columns)
    return ClassStatistics(np.array([num_samples // 2] * 2), means, scatter)


def test_the_rule_gives_the_papers_values_on_the_papers_features():
    statistics = statistics_of(512, 0.02, 50_000, math.sqrt(0.8))
    mixture = GaussianMixture.from_statistics(statistics)
    for settings in (CORRECTION, EBM):
        adapted = scaled(settings, statistics, mixture)
        for name in ("T", "T_G", "l2_weight", "input_noise", "lr", "steps"):
            assert getattr(adapted, name) == pytest.approx(getattr(settings, name)), name
        for name in ("step_size", "noise"):
            assert getattr(adapted, name) == pytest.approx(getattr(settings, name)), name
        # The EBM's chains begin at the features' own length, 1, not at 22.6.
        assert adapted.initial_std * math.sqrt(512) == pytest.approx(1.0024, abs=1e-4)


def test_the_rule_follows_dimension_spread_and_number():
    wide = statistics_of(128, 0.2, 500, 3.0)
    adapted = scaled(CORRECTION, wide, GaussianMixture.from_statistics(wide))
    assert adapted.noise == pytest.approx((1e-2, 1e-3))
    assert adapted.step_size == pytest.approx((1e-4, 1e-5))
    assert adapted.input_noise == pytest.approx(1e-2)
    assert pytest.approx(250) == adapted.T_G
    assert adapted.lr == pytest.approx(5e-6 * 3920 / 40)
    assert adapted.initial_std == pytest.approx(math.sqrt((0.04 * 128 + 9) / 128))
    assert scaled(EBM, wide, GaussianMixture.from_statistics(wide)).lr == 1e-3


@pytest.mark.parametrize(
    "change",
    [{"T": 0}, {"l2_weight": -1.0}, {"steps": 0}, {"noise": (0.1, -0.1)}, {"lr": math.inf}],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="must be > 0"):
        replace(CORRECTION, **change)


def test_betas_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\); came \(0.9, 1.0\)"):
        replace(CORRECTION, betas=(0.9, 1.0))


def test_features_that_cannot_train_are_refused():
    features, labels = clusters()
    mixture = GaussianMixture.fit(features, labels)
    with pytest.raises(ValueError, match="empty"):
        train(features[:0], mixture, SMALL)
    with pytest.raises(ValueError, match=r"must have shape \(N, 5\)"):
        train(features[:, :4], mixture, SMALL)
    broken = features.clone()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"1 NaN or infinite .* row 3"):
        train(broken, mixture, SMALL)
    model = train(features, mixture, SMALL).model
    with pytest.raises(ValueError, match=r"1 NaN or infinite .* row 3"):
        model(broken)
    assert model(features[:0]).shape == (0,)
