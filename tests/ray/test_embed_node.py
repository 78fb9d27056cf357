"""A node of a two-node cluster killed mid-run, in a process beside the session's Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

SCRIPT = """
import sys, threading
sys.path.insert(0, {folder!r})
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from test_embed_faults import NotingSource, barrier_in, go, held_storage
from tests.barrier import gone, wait_until
from pipelines.backbones.clip import BackboneConfig

backbone = BackboneConfig.model_validate_json({backbone!r})
place = Path({place!r})
source = NotingSource(root={root!r}, notes=str(place / "notes"))
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
barrier = barrier_in(place, node=second.node_id)

def kill():
    worker = barrier.arrived()
    cluster.remove_node(second, allow_graceful=False)
    wait_until(lambda: gone(worker))
    barrier.open()

killer = threading.Thread(target=kill)
killer.start()
cache = go(source, backbone, place, held_storage(place, barrier))
killer.join()
print("ADDRESS", cache.address)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_node_costs_only_its_shards(
    pictures: Path, backbone_files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    from pipelines.backbones.clip import BackboneConfig
    from pipelines.compute.cluster import ComputeConfig, connect
    from pipelines.data.features import FeatureCache
    from pipelines.data.storage import Storage
    from tests.ray.test_embed_faults import NotingSource, go, shards

    architecture, weights = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(architecture), path=str(weights))
    script = SCRIPT.format(
        folder=str(Path(__file__).parent),
        backbone=backbone.model_dump_json(),
        place=str(tmp_path / "disturbed"),
        root=str(pictures),
    )
    (tmp_path / "disturbed").mkdir()
    (tmp_path / "quiet").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    address = done.stdout.split("ADDRESS ")[1].split()[0]
    storage = Storage.open(str(tmp_path / "disturbed" / "storage"))
    source = NotingSource(root=str(pictures), notes=str(tmp_path / "notes"))
    with connect(ComputeConfig(num_cpus=4)):
        expected = shards(go(source, backbone, tmp_path / "quiet"))
    assert shards(FeatureCache(storage, address)) == expected
    begun = (tmp_path / "disturbed" / "notes").read_text().splitlines()
    assert len(begun) > 10  # the node took work with it, which was done again
