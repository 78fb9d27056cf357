"""Fitted scores: what is planned, found again, resumed, and judged as its formula says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.kept import Damaged
from pipelines.data.storage import Storage
from pipelines.fitted import fit
from pipelines.fitted import plan as fit_plan
from pipelines.fitted.address import address as address_of
from pipelines.fitted.class_statistics import reduce_shards
from pipelines.fitted.plan import ScoreFit
from pipelines.heads import Predictor
from pipelines.methods import METHODS
from pipelines.ood import FITTED_SCORES, KNN, SSD, energy
from pipelines.ood.energy_training import EnergyTrainer
from pipelines.ood.statistics import ClassStatistics
from pipelines.register.detector import Detector
from pipelines.score import by_name as scoring
from pipelines.score import cache as fitted_records
from pipelines.score import search as posthoc
from pipelines.score.config import PostHocConfig
from pipelines.score.judge import judge
from tests.feature_cache import flip_a_byte
from tests.feature_sets import clustered_sets
from tests.stored_heads import publish_head

DIM = 16
TINY = {"width": 8, "hidden": 2, "epochs": 3, "steps": 3, "batch_size": 16}
CORRECTION = METHODS["energy_correction"].Config(**TINY)
EBM = METHODS["feature_ebm"].Config(**TINY)
ZERO_SHOT = METHODS["zero_shot"].Config()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return Storage(str(tmp_path_factory.mktemp("fit")))


@pytest.fixture(scope="module")
def sets(storage):
    return clustered_sets(storage, dim=DIM)


@pytest.fixture(scope="module")
def data(sets, storage):
    found = fit.load_data(sets, storage, mode="in_process")
    sizes = (2, found.features.shape[1] - 2)
    return replace(found, layers=-found.features, layer_sizes=sizes, layers_address="layers")


def predictor(name="zero_shot"):
    random = np.random.default_rng(3)
    weight = random.normal(size=(3, DIM)).astype(np.float32)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    arrays = {"text_features": weight}
    if name == "linear_probe":
        arrays = {"weight": weight, "bias": random.normal(size=3).astype(np.float32)}
    return Predictor(name, arrays, {}, 7.5, ("cat", "dog", "cow"))


def store_head(storage, address, head):
    publish_head(storage, address, head)


def run(fits, data, storage, **options):
    return fit.run(fits, data, storage, compute=ComputeConfig(), mode="in_process", **options)


def test_statistics_of_shards_are_those_of_all_rows(sets, storage, data):
    whole = ClassStatistics.from_batch(data.features, data.labels, num_classes=3, normalize=True)
    np.testing.assert_array_equal(data.statistics.counts, whole.counts)
    np.testing.assert_allclose(data.statistics.means, whole.means, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(data.statistics.scatter, whole.scatter, rtol=1e-10, atol=1e-12)
    again = reduce_shards(sets.for_training(), "train", with_ray=False)
    np.testing.assert_array_equal(data.statistics.scatter, again.scatter)
    with pytest.raises(PermissionError, match="test data"):
        reduce_shards(sets.for_training(), "test", with_ray=False)


def test_statistics_of_a_damaged_shard_are_refused(tmp_path):
    """They used to be taken around its checksum: other means, and no word."""
    sets = clustered_sets(Storage(str(tmp_path)), dim=DIM)
    shard = sets.caches["train-two"]
    flip_a_byte(shard, float(shard.load(["train-two/30"])[0, 0]))
    with pytest.raises(UserError, match=r"train-two/00000\.parquet: not the bytes"):
        reduce_shards(sets.for_training(), "train", with_ray=False)


@pytest.mark.parametrize("name", [n for n in FITTED_SCORES if not scoring.reads_head(n)])
def test_a_record_of_features_is_the_scores_own_and_is_found_again(name, data, storage):
    params = {"k": 5} if name == "knn" else {}
    plan = fit_plan.plan({name: params}, method=ZERO_SHOT, methods={}, seed=2, head="none")
    assert list(plan) == [name]
    assert plan[name].seed == 0  # no seed decides it
    (address,) = run(plan.values(), data, storage)
    record = fitted_records.load_record(storage, name, address)
    options = {"normalize": True} if name == "gaussian_mixture" else params
    arrays = {n: getattr(data, n) for n in ("features", "labels", "layers", "layer_sizes")}
    wanted = FITTED_SCORES[name].fit(arrays, **options)
    queries = data.features[::3] + np.float32(0.05)
    torch.testing.assert_close(record(queries), wanted(queries), rtol=1e-6, atol=1e-6)
    before = storage.read_bytes("cache", "fitted", address, "record.safetensors")
    written = storage.local("cache", "fitted", address, "manifest.json").stat().st_mtime_ns
    assert run(plan.values(), data, storage) == [address]
    assert storage.local("cache", "fitted", address, "manifest.json").stat().st_mtime_ns == written
    assert fit.scoring.to_bytes(record) == before


def test_layers_decide_the_address_of_what_is_fitted_to_them_alone(data):
    other = replace(data, layers_address="others")
    plan = fit_plan.plan(
        {"layer_mahalanobis": {}, "ssd": {}}, method=ZERO_SHOT, methods={}, seed=0, head="none"
    )
    moved = [fit.address_of(one, data) != fit.address_of(one, other) for one in plan.values()]
    assert moved == [True, False]


@pytest.mark.parametrize("kind", ["zero_shot", "linear_probe"])
def test_vim_and_kl_matching_read_the_head(kind, data, storage):
    head = predictor(kind)
    store_head(storage, kind, head)
    plan = fit_plan.plan(
        {"vim": {}, "kl_matching": {}}, method=ZERO_SHOT, methods={}, seed=0, head=kind
    )
    addresses = dict(zip(plan, run(plan.values(), data, storage), strict=True))
    records = fitted_records.load_records(storage, addresses)
    judged = judge(head, {"vim": {}, "kl_matching": {}}, data.features[:9], records)
    weight = next(iter(head.arrays.values())).astype(np.float64) * 7.5
    bias = head.arrays.get("bias", np.zeros(3)).astype(np.float64) * 7.5
    logits = data.features.astype(np.float64) @ weight.T + bias
    arrays = {"features": data.features, "weight": weight, "bias": bias, "logits": logits}
    for name, rows in (("vim", data.features), ("kl_matching", logits)):
        wanted = FITTED_SCORES[name].fit(arrays | {"labels": data.labels})(rows[:9])
        np.testing.assert_allclose(judged[f"score_{name}"], wanted, rtol=1e-4, atol=1e-5)


def test_a_score_is_left_out_where_the_head_does_not_give_what_it_reads():
    assert not scoring.applies("vim", "tip_adapter")
    assert not scoring.applies("energy+vim", "tip_adapter")
    assert scoring.applies("kl_matching", "tip_adapter")
    assert scoring.applies("vim", "zero_shot")
    assert not scoring.applies("react", "linear_probe")  # unit features are no activations


def test_a_sum_is_z_normalised_by_the_whole_training_set(data, storage):
    head = predictor()
    store_head(storage, "sum", head)
    name, params = "energy+knn", {"energy.tau": 2.0, "knn.k": 3}
    plan = fit_plan.plan({name: params}, method=ZERO_SHOT, methods={}, seed=0, head="sum")
    assert list(plan) == ["knn", name]
    assert plan["knn"].params == {"k": 3}
    records = fitted_records.load_records(
        storage, dict(zip(plan, run(plan.values(), data, storage), strict=True))
    )
    queries = np.concatenate([data.features[:20], -data.features[:10]])
    judged = judge(head, {name: params}, queries, records)

    def both(rows, k):
        logits = torch.tensor(head.similarity(rows)).double() * 7.5
        neighbours = KNN.fit(data.features, k=k)(rows)
        return np.stack([energy(logits, 2.0).numpy(), neighbours.numpy()])

    # A training feature is its own first neighbour: the third other one is the fourth of all.
    train, query = both(data.features, 4), both(queries, 3)
    expected = (query - train.mean(axis=1, keepdims=True)) / train.std(axis=1, keepdims=True)
    np.testing.assert_allclose(judged[f"score_{name}"], expected.sum(axis=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [CORRECTION, EBM])
def test_an_energy_model_goes_on_from_its_last_epoch(config, data, tmp_path, monkeypatch):
    fits = [ScoreFit(config.name, {}, config, seed=1)]
    whole, halted = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "halted"))
    seen = []
    (address,) = run(fits, data, whole, on_progress=lambda *report: seen.append(report))
    assert seen == [(n, 3, f"epochs, {config.name} seed 1") for n in (1, 2, 3)]
    epoch = EnergyTrainer.epoch

    def stop_after_two(trainer):
        if len(trainer.history) == 2:
            raise KeyboardInterrupt
        return epoch(trainer)

    monkeypatch.setattr(EnergyTrainer, "epoch", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(fits, data, halted)
    assert not fitted_records.is_fitted(halted, address)
    ran = []
    monkeypatch.setattr(EnergyTrainer, "epoch", lambda t: ran.append(1) or epoch(t))
    assert run(fits, data, halted) == [address]
    assert len(ran) == 1
    place = ("cache", "fitted", address, "record.safetensors")
    assert halted.read_bytes(*place) == whole.read_bytes(*place)
    manifest = fitted_records.read_manifest(whole, address)
    assert [report["epoch"] for report in manifest.history] == [1, 2, 3]
    assert manifest.settings["T_G"] > 0
    assert manifest.history == fitted_records.read_manifest(halted, address).history
    # A checkpoint that was cut is no checkpoint: all epochs again, to the same record.
    halted.remove("cache", "fitted", address, "manifest.json")
    checkpoint = halted.local("cache", "fitted", address, "checkpoint.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    ran.clear()
    assert run(fits, data, halted) == [address]
    assert len(ran) == 3
    assert halted.read_bytes(*place) == whole.read_bytes(*place)


def test_damaged_statistics_and_records_are_made_again(sets, storage, data):
    """A flipped byte of a fitted score's record gave other scores, and no word."""
    (address,) = run([ScoreFit("knn", {"k": 2})], data, storage)
    entries = fit.statistics_entry(storage, data.address), fitted_records.entry(storage, address)
    for entry, name in zip(entries, (fit.STATISTICS, fitted_records.FILE), strict=True):
        path = storage.local(*entry.folder, name)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(Damaged, match="not the bytes that were written"):
            entry.read_all([name])
        again = fit.load_data(sets, storage, mode="in_process")
        assert run([ScoreFit("knn", {"k": 2})], again, storage) == [address]
        assert path.read_bytes() == content


def test_an_address_changes_with_what_decides_the_record(data):
    other = METHODS["energy_correction"].Config(**{**TINY, "l2_weight": 3.0})
    fits = [
        ScoreFit("energy_correction", {}, CORRECTION),
        ScoreFit("energy_correction", {}, CORRECTION, seed=1),
        ScoreFit("energy_correction", {}, other),
        ScoreFit("feature_ebm", {}, EBM),
        ScoreFit("knn", {"k": 1}),
        ScoreFit("knn", {"k": 2}),
        ScoreFit("vim", {}, head="a"),
        ScoreFit("vim", {}, head="b"),
    ]
    assert len({address_of(planned, data) for planned in fits}) == len(fits)
    # The head's own settings say nothing of the density.
    probe = CORRECTION.model_copy(update={"score": "mcm"})
    assert address_of(ScoreFit("energy_correction", {}, probe), data) == address_of(fits[0], data)


def test_settings_come_from_the_heads_own_method_then_the_runs_then_the_defaults():
    own = METHODS["energy_correction"].Config(l2_weight=1.0)
    of_run = METHODS["energy_correction"].Config(l2_weight=2.0)
    name = "energy_correction"
    assert fit_plan.settings_of(name, (own, of_run)).l2_weight == 1.0
    assert fit_plan.settings_of(name, (ZERO_SHOT, of_run)).l2_weight == 2.0
    assert fit_plan.settings_of(name, (ZERO_SHOT,)) == METHODS[name].Config()
    assert fit_plan.settings_of("knn", (own,)) is None


def test_divergence_is_one_line_for_the_user(data, tmp_path):
    wild = METHODS["energy_correction"].Config(**{**TINY, "lr": 1e20})
    with pytest.raises(UserError, match="score energy_correction: the energy model diverged"):
        run([ScoreFit("energy_correction", {}, wild)], data, Storage(str(tmp_path)))
    with pytest.raises(UserError, match=r"score knn: k must lie in 1\.\.60"):
        run([ScoreFit("knn", {"k": 61})], data, Storage(str(tmp_path)))


@pytest.fixture(scope="module")
def every(data, storage):
    """All fitted scores and two sums of one head, with their records."""
    head = predictor()
    store_head(storage, "every", head)
    scores = {name: {"k": 4} if name == "knn" else {} for name in scoring.FITTED}
    scores["energy+energy_correction"] = {"energy.tau": 3.0}
    scores["delta_energy+knn"] = {"delta_energy.tau": 0.3, "delta_energy.c": 2, "knn.k": 4}
    methods = {m.name: m for m in (CORRECTION, EBM)}
    plan = fit_plan.plan(scores, method=ZERO_SHOT, methods=methods, seed=0, head="every")
    addresses = dict(zip(plan, run(plan.values(), data, storage), strict=True))
    return head, scores, fitted_records.load_records(storage, addresses)


def moved(rows):
    """In place of the features after each score's input step."""
    return dict.fromkeys(scoring.OWN_PASS, -rows)


def test_a_rows_fitted_scores_have_the_same_bits_in_any_batch(every):
    head, scores, records = every
    random = np.random.default_rng(7)
    rows = random.normal(size=(600, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def judged(some):
        return judge(head, scores, some, records, passes=moved(some))

    whole, order = judged(rows), random.permutation(600)
    shuffled = judged(rows[order])
    few = [judged(rows[i : i + 7]) for i in range(0, 70, 7)]
    assert {f"score_{name}" for name in scores} <= set(whole)
    for name, values in whole.items():
        assert np.isfinite(values).all(), name
        np.testing.assert_array_equal(shuffled[name], values[order], name)
        np.testing.assert_array_equal(np.concatenate([f[name] for f in few]), values[:70], name)


def test_a_saved_detector_judges_by_its_record(every, tmp_path):
    head, scores, records = every
    for name in ("knn", "energy_correction", "energy+energy_correction"):
        needed = {n: records[n] for n in scoring.records_needed(name)}
        detector = Detector(head, None, name, scores[name], -1.0, records=needed)
        detector.save(tmp_path / name)
        rows = np.eye(DIM, dtype=np.float32)
        again = Detector.load(tmp_path / name)
        assert again.judge_features(rows).equals(detector.judge_features(rows))
        np.testing.assert_array_equal(
            again.judge_features(rows)["score"].to_numpy(),
            judge(head, scores, rows, records, passes=moved(rows))[f"score_{name}"],
        )
    odin = Detector(head, None, "odin", {}, -1.0, records={"odin": records["odin"]})
    odin.save(tmp_path / "odin")
    again = Detector.load(tmp_path / "odin")
    with pytest.raises(UserError, match="give images, not features"):
        again.judge_features(rows)
    judged = odin.judge_features(rows, own_pass=rows)
    assert again.judge_features(rows, own_pass=rows).equals(judged)


def test_ssd_and_the_mixture_rank_alike_here(every, data):
    """Far apart classes: log-sum-exp is the nearest distance."""
    head, scores, records = every
    judged = judge(
        head, {n: scores[n] for n in ("ssd", "gaussian_mixture")}, data.features, records
    )
    wanted = SSD.fit(data.features, data.labels)(data.features)
    np.testing.assert_allclose(judged["score_ssd"], wanted, rtol=1e-6, atol=1e-6)
    bound = np.log(3) / 1e3
    assert np.abs(judged["score_gaussian_mixture"] - judged["score_ssd"] / 1e3).max() <= bound


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nope", r"no score 'nope'; allowed: msp, .*knn.*energy\+knn"),
        ("energy+nope", "no score 'nope'"),
        ("energy+odin", "no score 'odin' in a sum"),
        ("energy+gl_mcm", "no score 'gl_mcm' in a sum"),
        ("knn+knn", "a sum needs different scores"),
    ],
)
def test_names_that_are_no_score(name, said):
    with pytest.raises(ValueError, match=said):
        raise ValueError(scoring.problem(name))
    assert scoring.problem("delta_energy+energy_correction") is None


def test_what_is_tried_of_a_fitted_score():
    config = PostHocConfig(k=[1, 10, 100])
    assert posthoc.fitted_settings("knn", config, num_train=60) == [{"k": 1}, {"k": 10}]
    assert posthoc.fitted_settings("knn", PostHocConfig(k=[9]), num_train=4) == [{"k": 4}]
    assert posthoc.fitted_settings("ssd", config, num_train=60) == [{}]
    assert posthoc.defaults("knn", num_train=10_000) == {"k": 50}
    assert posthoc.defaults("energy+knn", num_train=12) == {"energy.tau": 1.0, "knn.k": 12}
