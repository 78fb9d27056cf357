"""Fitting with Ray: the reduction and the training against the same work in this process."""

import numpy as np
import pytest
import torch

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.fitted import fit
from pipelines.fitted.class_statistics import reduce_shards
from pipelines.fitted.plan import ScoreFit
from pipelines.methods import METHODS
from pipelines.score import cache as fitted_records
from tests.feature_sets import clustered_sets

TINY = {"width": 8, "hidden": 2, "epochs": 2, "steps": 3, "batch_size": 16}
FITS = [
    ScoreFit("energy_correction", {}, METHODS["energy_correction"].Config(**TINY), seed=1),
    ScoreFit("feature_ebm", {}, METHODS["feature_ebm"].Config(**TINY)),
    ScoreFit("knn", {"k": 2}),
]


def scores(storage, addresses, rows):
    return [
        fitted_records.load_record(storage, planned.score, address)(rows)
        for planned, address in zip(FITS, addresses, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_what_this_process_gives(tmp_path):
    sets = clustered_sets(Storage(str(tmp_path)))
    storages = [Storage(str(tmp_path / name)) for name in ("here", "ray", "two")]
    here, on_ray, two = storages
    # The reduction: the same bits, in whatever order the shards come back.
    reduced = reduce_shards(sets.for_training(), "train", with_ray=False)
    again = reduce_shards(sets.for_training(), "train", with_ray=True)
    for name in ("counts", "means", "scatter"):
        np.testing.assert_array_equal(getattr(again, name), getattr(reduced, name))
    assert reduced.num_samples == 60
    assert len(sets.names("train")) == 1

    data = fit.load_data(sets, here, mode="in_process")
    seen = []
    wanted = fit.run(FITS, data, here, compute=ComputeConfig(), mode="in_process")
    addresses = fit.run(
        FITS, data, on_ray, compute=ComputeConfig(), on_progress=lambda *a: seen.append(a[:2])
    )
    assert addresses == wanted
    assert seen == [(n, 4) for n in (1, 2, 3, 4)]
    for address in addresses:
        place = ("cache", "fitted", address, "record.safetensors")
        assert on_ray.read_bytes(*place) == here.read_bytes(*place)
    assert not on_ray.names("cache", "ray_train")

    # Two workers, each with half of every batch's chains, in float32, where Adam makes steps of
    # full length from gradients of rounding; in float64 a unit test asks for 1e-6.
    fitted_records.load_record.cache_clear()
    pair = fit.run(FITS, data, two, compute=ComputeConfig(train_workers=2))
    for mine, whole in zip(
        scores(two, pair, data.features), scores(here, wanted, data.features), strict=True
    ):
        torch.testing.assert_close(mine, whole, rtol=2e-3, atol=2e-3)
    histories = [fitted_records.read_manifest(s, wanted[0]).history for s in (here, two)]
    for one, other in zip(*histories, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-3)

    # A training that diverges is one line, not three restarts and a traceback.
    wild = METHODS["energy_correction"].Config(**{**TINY, "lr": 1e20})
    with pytest.raises(UserError, match="score energy_correction: the energy model diverged"):
        fit.run(
            [ScoreFit("energy_correction", {}, wild)],
            data,
            two,
            compute=ComputeConfig(train_workers=2),
        )
