"""The Ray Train stage against the same loop in this process: equal to the last bit."""

import dataclasses

import pytest

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune.cache import address, load_predictor, read_record
from pipelines.finetune.loop import TrainingJob
from pipelines.finetune.stage import train
from pipelines.methods import METHODS
from tests.ray.small_backbone import files, write_backbone
from tests.small_clip import toy_data

TRAINING = {"epochs": 3, "batch_size": 16, "warmup_epochs": 1, "lr": 0.02}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone on disk, as `resolve` names it."""
    return write_backbone(tmp_path_factory.mktemp("backbone"))


def jobs():
    coop = METHODS["coop"].Config(head={"name": "coop", "num_context": 4}, training=TRAINING)
    ebm = METHODS["ebm"].Config(head={"name": "coop", "num_context": 4}, training=TRAINING)
    return [
        TrainingJob(METHODS["zero_shot"].Config(), 0),
        TrainingJob(coop, 0),
        TrainingJob(coop, 1),
        TrainingJob(ebm, 0),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_one_ray_train_worker_gives_the_bytes_of_the_same_loop_in_process(tmp_path, backbone):
    data, compute = toy_data(), ComputeConfig()
    on_ray, here = Storage(str(tmp_path / "ray")), Storage(str(tmp_path / "here"))
    seen = []
    heads = train(
        jobs(),
        data,
        backbone,
        on_ray,
        compute=compute,
        on_epoch=lambda job, report: seen.append((job.method.name, job.seed, report["epoch"])),
    )
    again = train(jobs(), data, backbone, here, compute=compute, mode="in_process")
    assert heads == again
    assert len(set(heads)) == 4
    for head in heads:
        assert files(on_ray, head) == files(here, head)
        assert read_record(on_ray, head) == read_record(here, head)
    trained = [("coop", 0), ("coop", 1), ("ebm", 0)]
    assert seen == [(*job, float(epoch)) for job in trained for epoch in (1, 2, 3)]
    assert not on_ray.names("cache", "ray_train")


def test_heads_that_the_cache_holds_need_no_ray(tmp_path, backbone):
    data, storage = toy_data(), Storage(str(tmp_path))
    first = train(jobs(), data, backbone, storage, compute=ComputeConfig(), mode="in_process")
    before = {head: files(storage, head) for head in first}
    # mode="ray" would fail here: no Ray is asked for when nothing is missing.
    calls = []
    second = train(
        jobs(),
        data,
        backbone,
        storage,
        compute=ComputeConfig(),
        on_epoch=lambda *report: calls.append(report),
    )
    assert second == first
    assert not calls
    assert {head: files(storage, head) for head in second} == before


def test_a_heads_address_changes_with_setting_seed_and_data(backbone):
    job, data = jobs()[1], toy_data()
    longer = job.method.model_copy(
        update={"training": job.method.training.model_copy(update={"epochs": 4})}
    )
    addresses = {
        address(job, data, backbone),
        address(TrainingJob(job.method, 1), data, backbone),
        address(TrainingJob(longer, 0), data, backbone),
        address(job, dataclasses.replace(data, address="other"), backbone),
        address(jobs()[3], data, backbone),
    }
    assert len(addresses) == 5


def test_no_selection_criterion_and_no_score_parameter_is_in_a_heads_address(backbone):
    job, data = jobs()[1], toy_data()
    for change in ({"score": "energy"}, {"score_params": {"mcm": {"tau": 0.5}}}):
        other = TrainingJob(job.method.model_copy(update=change), job.seed)
        assert address(other, data, backbone) == address(job, data, backbone)


def test_a_stored_head_is_the_trained_one(tmp_path, backbone):
    storage, data = Storage(str(tmp_path)), toy_data()
    heads = train(jobs(), data, backbone, storage, compute=ComputeConfig(), mode="in_process")
    predictor = load_predictor(storage, heads[1])
    record = read_record(storage, heads[1])
    best = record.history[record.best_epoch - 1]
    logits = predictor.similarity(data.validation_features) * predictor.logit_scale
    share = float((logits.argmax(axis=1) == data.validation_labels).mean())
    assert share == pytest.approx(best["validation/accuracy"], abs=1e-6)
