import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import pytorch_ood.detector as published
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import EmpiricalCovariance, oas
from sklearn.neighbors import NearestNeighbors
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.ood.density import (
    SSD,
    GaussianMixture,
    KLMatching,
    Mahalanobis,
    RelativeMahalanobis,
    ViM,
)
from pipelines.ood.fitted_scores import FITTED_SCORES
from pipelines.ood.metrics import auroc
from pipelines.ood.nearest_neighbours import KNN
from pipelines.ood.records import move, record_from_state, record_state
from pipelines.ood.statistics import ClassStatistics, merge_all

NUM_CLASSES = 4


def problem(num_rows=200, num_columns=6, seed=0, dtype=torch.float64):
    """Training arrays of a clustered problem, and test features: near the clusters and far."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(NUM_CLASSES, num_columns, generator=generator, dtype=dtype)
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=generator)
    labels[:NUM_CLASSES] = torch.arange(NUM_CLASSES)
    mixing = torch.randn(num_columns, num_columns, generator=generator, dtype=dtype)
    mixing = torch.eye(num_columns, dtype=dtype) + 0.3 / math.sqrt(num_columns) * mixing
    noise = torch.randn(num_rows, num_columns, generator=generator, dtype=dtype) @ mixing
    features = means[labels] + 0.2 * noise
    weight = torch.randn(NUM_CLASSES, num_columns, generator=generator, dtype=dtype)
    bias = torch.randn(NUM_CLASSES, generator=generator, dtype=dtype)
    far = 3 * torch.randn(20, num_columns, generator=generator, dtype=dtype)
    arrays = {"features": features, "labels": labels, "weight": weight, "bias": bias}
    arrays |= {"logits": features @ weight.T + bias, "perturbed_features": features}
    arrays |= {"layers": features, "layer_sizes": torch.tensor([1, num_columns - 1])}
    return arrays | {"activations": features.abs()}, far


def scored(row, arrays, features):
    """What a row of the table reads of features."""
    if row.input in ("features", "perturbed_features", "layers"):
        return features
    if row.input == "activations":
        return features.abs()
    return features @ arrays["weight"].T.to(features.dtype) + arrays["bias"].to(features.dtype)


def unit(rows):
    return np.stack([row / math.sqrt(sum(x * x for x in row)) for row in np.asarray(rows)])


def loop_gaussians(features, labels):
    """Class means and precision, from sums over single rows."""
    features, labels = np.asarray(features), np.asarray(labels)
    means = [features[labels == c].mean(axis=0) for c in sorted(set(labels.tolist()))]
    scatter = np.zeros((features.shape[1],) * 2)
    for row, label in zip(features, labels, strict=True):
        delta = row - means[label]
        scatter += np.outer(delta, delta)
    return means, np.linalg.inv(scatter / len(features))


def loop_distances(means, precision, rows):
    return np.array([[(z - mu) @ precision @ (z - mu) for mu in means] for z in np.asarray(rows)])


# Activation shaping and ODIN judge by a layer, which is at random here.
BY_LAYER = [n for n, r in FITTED_SCORES.items() if r.input == "activations" or n == "odin"]


@pytest.mark.parametrize("name", sorted(FITTED_SCORES.keys() - set(BY_LAYER)))
def test_every_fitted_score_ranks_training_features_above_far_ones(name):
    arrays, far = problem()
    row = FITTED_SCORES[name]
    if name == "kl_matching":  # a head that predicts the clusters, and far rows near no cluster
        arrays["logits"] = 8 * torch.nn.functional.one_hot(arrays["labels"]).double()
        fitted = row.fit(arrays)
        assert auroc(fitted(arrays["logits"]), fitted(torch.zeros(20, NUM_CLASSES))) == 1
    else:
        fitted = row.fit(arrays)
        assert auroc(fitted(arrays["features"]), fitted(far)) > 0.75


@pytest.mark.parametrize("name", FITTED_SCORES)
def test_every_fitted_score_is_frozen_walks_blocks_and_survives_saving(name, monkeypatch):
    arrays, far = problem(dtype=torch.float32)
    row = FITTED_SCORES[name]
    fitted = row.fit(arrays)
    rows = scored(row, arrays, far)
    values = fitted(rows)
    assert values.dtype == torch.float64
    assert values.shape == (20,)
    assert fitted(rows[:0]).shape == (0,)
    with pytest.raises(FrozenInstanceError):
        setattr(fitted, next(iter(vars(fitted))), None)
    again = record_from_state(type(fitted), record_state(fitted))
    assert torch.equal(again(rows), values)
    assert torch.equal(move(fitted, torch.device("cpu"))(rows), values)
    torch.testing.assert_close(fitted(rows.numpy()), values, rtol=0, atol=0)
    for module in ("rows", "nearest_neighbours"):
        monkeypatch.setattr(f"pipelines.ood.{module}._BLOCK", 40)
    monkeypatch.setattr("pipelines.ood.nearest_neighbours._QUERIES", 7)
    monkeypatch.setattr("pipelines.ood.nearest_neighbours._NEIGHBOURS", 9)
    # A matrix product may round differently in another shape.
    torch.testing.assert_close(fitted(rows), values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(row.fit(arrays)(rows), values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FITTED_SCORES)
def test_every_fitted_score_says_what_it_cannot_take(name):
    arrays, far = problem()
    row = FITTED_SCORES[name]
    fitted = row.fit(arrays)
    broken = scored(row, arrays, far).clone()
    broken[3, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 NaN or infinite .* row 3"):
        fitted(broken)
    with pytest.raises(ValueError, match="must have shape"):
        fitted(torch.zeros(2, 99))
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        fitted(torch.zeros(6))
    bad = dict(arrays)
    bad[row.inputs[0]] = torch.full_like(arrays[row.inputs[0]], math.inf)
    with pytest.raises(ValueError, match="NaN or infinite"):
        row.fit(bad)
    with pytest.raises(ValueError, match=f"missing: .*{row.inputs[-1]}"):
        row.fit(arrays | {row.inputs[-1]: None})
    with pytest.raises(ValueError, match=r"unknown: .*wrong"):
        row.fit(arrays, wrong=1)
    if row.inputs == ("weight",):
        return  # nothing is learned from rows
    empty = {key: value[:0] if len(value) == 200 else value for key, value in arrays.items()}
    with pytest.raises(ValueError, match=r"empty|1\.\.0"):
        row.fit(empty)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_gaussian_scores_equal_plain_loops(seed, num_columns):
    arrays, far = problem(120, num_columns, seed)
    features, labels = arrays["features"], arrays["labels"]
    distances = loop_distances(*loop_gaussians(features, labels), far)
    plain = Mahalanobis.fit(features, labels)(far)
    np.testing.assert_allclose(plain, -distances.min(axis=1), rtol=1e-9, atol=1e-9)

    background = loop_distances(*loop_gaussians(features, torch.zeros(120, dtype=int)), far)[:, 0]
    relative = RelativeMahalanobis.fit(features, labels)(far)
    expected = background - distances.min(axis=1)
    np.testing.assert_allclose(relative, expected, rtol=1e-9, atol=1e-8)

    normalized = loop_distances(*loop_gaussians(unit(features), labels), unit(far))
    ssd = SSD.fit(features, labels)(far)
    np.testing.assert_allclose(ssd, -normalized.min(axis=1), rtol=1e-8, atol=1e-8)

    shares = np.bincount(labels, minlength=NUM_CLASSES) / 120
    for weighted, factor in ((False, np.ones(NUM_CLASSES)), (True, shares)):
        mixture = GaussianMixture.fit(features, labels, T_G=2.0, weighted=weighted)(far)
        near = distances.min(axis=1)
        sums = (factor * np.exp(-(distances - near[:, None]))).sum(axis=1)
        np.testing.assert_allclose(mixture, (np.log(sums) - near) / 2, rtol=1e-9, atol=1e-9)


def test_gaussian_scores_equal_scikit_learns_and_pytorch_oods():
    arrays, far = problem(dtype=torch.float32)
    features, labels = arrays["features"], arrays["labels"]
    mean = torch.stack([features[labels == c].mean(0) for c in range(NUM_CLASSES)])
    residuals = (features - mean[labels]).double().numpy()
    covariance = EmpiricalCovariance(assume_centered=True).fit(residuals)
    distances = [covariance.mahalanobis((far - center).double().numpy()) for center in mean]
    values = Mahalanobis.fit(features, labels)(far)
    np.testing.assert_allclose(values, -np.min(distances, axis=0), rtol=1e-5)
    # Theirs: half of it, a scatter that is not over N, and HIGH for OOD.
    theirs = published.Mahalanobis(None).fit_features(features, labels).predict_features(far)
    np.testing.assert_allclose(values, -2 * len(features) * theirs, rtol=1e-3)
    theirs = published.RMD(None).fit_features(features, labels).predict_features(far)
    relative = RelativeMahalanobis.fit(features, labels)(far)
    np.testing.assert_allclose(relative, -len(features) * theirs, rtol=1e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([Mahalanobis, SSD, RelativeMahalanobis]))
def test_merged_shards_give_the_record_of_all_rows(seed, record):
    arrays, far = problem(90, 5, seed)
    order = np.random.default_rng(seed).permutation(90)
    merged = merge_all(
        ClassStatistics.from_batch(
            arrays["features"][part],
            arrays["labels"][part],
            num_classes=NUM_CLASSES + 2,  # two classes are never seen
            normalize=record is SSD,
        )
        for part in np.array_split(order, 4)
    )
    whole = record.fit(arrays["features"], arrays["labels"])
    torch.testing.assert_close(record.from_statistics(merged)(far), whole(far), rtol=1e-9, atol=0)


def test_statistics_must_be_normalised_as_the_score_is():
    arrays, _ = problem()
    plain, normalized = (
        ClassStatistics.from_batch(
            arrays["features"], arrays["labels"], num_classes=NUM_CLASSES, normalize=normalize
        )
        for normalize in (False, True)
    )
    for record, wrong in ((Mahalanobis, normalized), (SSD, plain)):
        with pytest.raises(ValueError, match="normalize="):
            record.from_statistics(wrong)
    assert GaussianMixture.from_statistics(normalized).normalize


def test_a_singular_covariance_is_shrunk_by_the_oracle_approximating_rule():
    arrays, far = problem(num_rows=40, num_columns=60, seed=1)  # N < D
    features, labels = arrays["features"].numpy(), arrays["labels"].numpy()
    means = [features[labels == c].mean(axis=0) for c in range(NUM_CLASSES)]
    residuals = features - np.stack(means)[labels]
    shrunk, shrinkage = oas(residuals, assume_centered=True)
    assert 0 < shrinkage < 1
    expected = loop_distances(means, np.linalg.inv(shrunk), far).min(axis=1)
    np.testing.assert_allclose(Mahalanobis.fit(features, labels)(far), -expected, rtol=1e-8)


def test_shrinkage_zero_is_the_pseudo_inverse_and_blind_to_unseen_directions():
    arrays, far = problem(num_rows=40, num_columns=60, seed=1)
    features, labels = arrays["features"].numpy(), arrays["labels"].numpy()
    means = [features[labels == c].mean(axis=0) for c in range(NUM_CLASSES)]
    residuals = features - np.stack(means)[labels]
    precision = np.linalg.pinv(residuals.T @ residuals / 40, hermitian=True)
    fitted = Mahalanobis.fit(features, labels, shrinkage=0.0)
    expected = loop_distances(means, precision, far).min(axis=1)
    np.testing.assert_allclose(fitted(far), -expected, rtol=1e-6)
    unseen = np.linalg.svd(residuals)[2][-1]  # a direction without training variance
    moved = np.stack([means[0], means[0] + 100 * unseen])
    assert fitted(moved).abs().max() < 1e-6
    assert Mahalanobis.fit(features, labels)(moved)[1] < -1.0


def test_a_channel_that_never_fires_is_rounding_and_no_variance():
    """float32 features whose last channel differs by 1e-7 of the others: as a network leaves it."""
    arrays, far = problem(num_rows=400, num_columns=20, seed=3)
    noise = torch.randn(len(far), 1, generator=torch.Generator().manual_seed(4)).double()
    dead = [1e-7 * noise[torch.arange(rows) % len(noise)] for rows in (400, len(far))]
    alive = arrays["features"]
    features = torch.cat([alive, dead[0]], dim=1).float()
    judged = torch.cat([far, dead[1] + 1e-5], dim=1).float()
    fitted = Mahalanobis.fit(features, arrays["labels"])
    residuals = (
        alive
        - torch.stack([alive[arrays["labels"] == c].mean(dim=0) for c in range(NUM_CLASSES)])[
            arrays["labels"]
        ]
    ).numpy()
    _, shrinkage = oas(np.pad(residuals, ((0, 0), (0, 1))), assume_centered=True)
    assert shrinkage > 0
    blind = Mahalanobis.fit(features, arrays["labels"], shrinkage=0.0)(judged)
    without = Mahalanobis.fit(alive, arrays["labels"], shrinkage=0.0)(far)
    torch.testing.assert_close(blind.double(), without, rtol=1e-4, atol=1e-4)
    # Counted as a variance, the shift of 1e-5 alone would be a distance of 100 deviations.
    assert (fitted(judged) > 3 * without - 10).all()


@pytest.mark.parametrize("name", ["ssd", "relative_mahalanobis", "gaussian_mixture", "vim"])
def test_fewer_samples_than_dimensions_still_separate(name):
    arrays, far = problem(num_rows=40, num_columns=60, seed=2)
    test, _ = problem(num_rows=40, num_columns=60, seed=2)
    fitted = FITTED_SCORES[name].fit(arrays)
    generator = torch.Generator().manual_seed(9)
    jitter = 0.05 * torch.randn(40, 60, generator=generator, dtype=torch.float64)
    near = fitted(test["features"] + jitter)
    assert torch.isfinite(near).all()
    assert auroc(near, fitted(far)) > 0.9


@pytest.mark.parametrize("shrinkage", [0.3, 1.0])
def test_given_shrinkage_blends_with_the_mean_variance(shrinkage):
    arrays, far = problem()
    features, labels = arrays["features"], arrays["labels"]
    means, precision = loop_gaussians(features, labels)
    covariance = np.linalg.inv(precision)
    blend = shrinkage * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    precision = np.linalg.inv((1 - shrinkage) * covariance + blend)
    values = Mahalanobis.fit(features, labels, shrinkage=shrinkage)(far)
    np.testing.assert_allclose(values, -loop_distances(means, precision, far).min(1), rtol=1e-9)


def test_the_mixtures_energy_is_differentiable_and_its_samples_have_its_moments():
    arrays, far = problem(400, 4)
    mixture = GaussianMixture.fit(arrays["features"], arrays["labels"])
    rows = far[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(mixture.energy, (rows,))
    drawn = mixture.gaussians.sample(40_000, torch.Generator().manual_seed(0))
    again = mixture.gaussians.sample(40_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    features = arrays["features"]
    covariance = np.cov(features.numpy().T, bias=True)
    error = 5 * math.sqrt(np.trace(covariance) / 40_000)
    assert (drawn.mean(0) - features.mean(0)).norm() < error
    np.testing.assert_allclose(
        np.cov(drawn.numpy().T), covariance, rtol=0.05, atol=0.03 * np.trace(covariance)
    )
    single = move(mixture, torch.float32)
    assert single.energy(far.float()).dtype == torch.float32
    torch.testing.assert_close(
        single.energy(far.float()).double(), mixture.energy(far), rtol=1e-4, atol=1e-2
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([torch.float32, torch.float64]))
def test_knn_equals_scikit_learns_and_plain_sorting(seed, k, dtype):
    arrays, far = problem(60, 5, seed, dtype)
    arrays["features"][10] = arrays["features"][3]  # a tie
    values = KNN.fit(arrays["features"], k=k)(far)
    train, test = unit(arrays["features"].double()), unit(far.double())
    plain = [sorted(math.dist(row, other) for other in train)[k - 1] for row in test]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(values, -np.array(plain), rtol=0, atol=tolerance)
    theirs = NearestNeighbors(n_neighbors=k).fit(train).kneighbors(test)[0][:, -1]
    np.testing.assert_allclose(values, -theirs, rtol=0, atol=tolerance)


def test_knn_of_training_rows_is_zero_and_pytorch_ood_agrees():
    arrays, far = problem(dtype=torch.float32)
    features = arrays["features"]
    assert KNN.fit(features, k=1)(features).abs().max() == 0
    theirs = published.KNN(None, k=7).fit_features(features, arrays["labels"])
    np.testing.assert_allclose(
        KNN.fit(features, k=7)(far), -theirs.predict_features(far), atol=1e-6
    )


@pytest.mark.parametrize("name", FITTED_SCORES)
def test_read_only_arrays_can_be_fitted_and_scored(name):
    """Parquet and Ray hand out arrays that cannot be written to."""
    arrays, _ = problem()
    frozen = {key: value.numpy().copy() for key, value in arrays.items()}
    for array in frozen.values():
        array.flags.writeable = False
    row = FITTED_SCORES[name]
    values = row.fit(frozen)(frozen[row.input])
    torch.testing.assert_close(values, row.fit(arrays)(arrays[row.input]), rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("name", FITTED_SCORES)
def test_no_score_holds_more_than_its_input_and_a_block(name, monkeypatch):
    for module in ("rows", "nearest_neighbours"):
        monkeypatch.setattr(f"pipelines.ood.{module}._BLOCK", 8_000)
    monkeypatch.setattr("pipelines.ood.nearest_neighbours._QUERIES", 20)
    monkeypatch.setattr("pipelines.ood.nearest_neighbours._NEIGHBOURS", 300)
    arrays, _ = problem(num_rows=1_500)
    row = FITTED_SCORES[name]
    rows = scored(row, arrays, arrays["features"][:200])
    with LargestTensor() as memory:
        row.fit(arrays)(rows)
    assert memory.largest <= arrays["features"].numel()  # 9,000; all pairs would be 300,000


def test_vim_equals_its_formula_and_pytorch_oods():
    arrays, far = problem(dtype=torch.float64)
    features, weight, bias = arrays["features"], arrays["weight"], arrays["bias"]
    fitted = ViM.fit(features, None, weight, bias, num_components=2)
    origin = -np.linalg.pinv(weight.numpy()) @ bias.numpy()
    centred = features.numpy() - origin
    basis = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, 2:]

    def parts(rows):
        logits = rows @ weight.numpy().T + bias.numpy()
        residual = np.linalg.norm((rows - origin) @ basis @ basis.T, axis=1)
        return logits, residual

    logits, residual = parts(features.numpy())
    alpha = logits.max(axis=1).mean() / residual.mean()
    logits, residual = parts(far.numpy())
    expected = [math.log(sum(math.exp(x - max(f)) for x in f)) + max(f) for f in logits]
    np.testing.assert_allclose(fitted(far), expected - alpha * residual, rtol=1e-9)
    theirs = published.ViM(None, 2, weight, bias).fit_features(features, arrays["labels"])
    np.testing.assert_allclose(fitted(far), -theirs.predict_features(far), rtol=1e-3, atol=1e-3)


def test_vims_default_dimension_is_that_of_its_code_and_at_most_half_the_rank():
    arrays, _ = problem(num_columns=6)
    assert ViM.fit(arrays["features"], None, arrays["weight"]).residual.shape == (6, 3)
    few, _ = problem(num_rows=10, num_columns=60)
    assert ViM.fit(few["features"], None, few["weight"]).residual.shape == (60, 55)
    with pytest.raises(ValueError, match=r"num_components must lie in 0\.\.9"):
        ViM.fit(few["features"], None, few["weight"], num_components=10)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 30.0]))
def test_kl_matching_equals_a_plain_loop_and_skips_classes_never_predicted(seed, scale):
    generator = np.random.default_rng(seed)
    train, test = scale * generator.normal(size=(40, 5)), scale * generator.normal(size=(8, 5))
    train[:, 2] = -10 * scale  # never predicted
    softmax = [np.exp(f - f.max()) / np.exp(f - f.max()).sum() for f in np.r_[train, test]]
    predicted = sorted({int(np.argmax(p)) for p in softmax[:40]})
    templates = [np.mean([p for p in softmax[:40] if np.argmax(p) == c], axis=0) for c in predicted]
    expected = [
        -min(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0) for q in templates
        )
        for p in softmax[40:]
    ]
    fitted = KLMatching.fit(train)
    assert len(fitted.log_means) == len(templates)
    np.testing.assert_allclose(fitted(test), expected, rtol=1e-9, atol=1e-12)
    theirs = published.KLMatching(None).fit_logits(torch.from_numpy(train))
    np.testing.assert_allclose(
        fitted(test), -theirs.predict_logits(torch.from_numpy(test)), rtol=1e-6, atol=1e-9
    )


def test_kl_matching_stays_finite_where_probabilities_underflow():
    fitted = KLMatching.fit(torch.tensor([[2000.0, 0.0], [0.0, 2000.0]]))
    assert torch.equal(fitted(torch.tensor([[2000.0, 0.0]])), torch.zeros(1, dtype=torch.float64))
    half = fitted(torch.tensor([[1.0, 1.0]]))
    assert half.item() == pytest.approx(math.log(2) - 1000, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mahalanobis.fit(torch.ones(4, 2), [0, 0, 1, 1]), "do not vary"),
        (lambda: Mahalanobis.fit(torch.eye(3), [0, 1, 2]), "do not vary"),
        (lambda: Mahalanobis.fit(torch.eye(3), [0, 1]), "number of features and labels"),
        (lambda: Mahalanobis.fit(torch.eye(3), [0, 0, -1]), "labels"),
        (lambda: Mahalanobis.fit(torch.eye(3), [0, 0, 0], shrinkage=1.1), "shrinkage"),
        (lambda: SSD.fit(torch.zeros(3, 2), [0, 0, 0]), "zeros"),
        (lambda: SSD.fit(torch.eye(3), [0, 0, 0])(torch.zeros(1, 3)), "zeros"),
        (lambda: GaussianMixture.fit(torch.eye(3), [0, 0, 0], T_G=0.0), "T_G"),
        (lambda: KNN.fit(torch.eye(3), k=4), r"k must lie in 1\.\.3"),
        (lambda: KNN.fit(torch.eye(3), k=0), "k must lie in"),
        (lambda: KNN.fit(torch.zeros(3, 2), k=1), "zeros"),
        (lambda: ViM.fit(torch.eye(3), None, torch.eye(3), torch.ones(2)), "bias"),
        (lambda: ViM.fit(torch.eye(3), None, torch.eye(2)), "features must have shape"),
        (lambda: record_from_state(KNN, {"k": torch.tensor(1)}), "KNN lacks features"),
    ],
)
def test_mistakes_are_value_errors_that_say_which(call, message):
    with pytest.raises(ValueError, match=message):
        call()
