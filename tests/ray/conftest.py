import warnings

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address="local", num_cpus=4, include_dashboard=False)
    yield
    ray.shutdown()
