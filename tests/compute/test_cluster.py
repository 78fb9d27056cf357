"""Which cluster a job joins, and how it is left."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.compute.cluster import ComputeConfig, connect
from tests.ray.processes import descendants


class Fake:
    """Stands in for ray.init and ray.shutdown; `failures` come first."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls: list[dict[str, Any]] = []
        self.stopped = 0

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if self.failures:
            raise self.failures.pop(0)

    def shutdown(self) -> None:
        self.stopped += 1


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake(*getattr(request, "param", ()))
    monkeypatch.setattr(ray, "init", found.init)
    monkeypatch.setattr(ray, "shutdown", found.shutdown)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return found


def test_a_local_ray_has_slots_for_nested_work_and_no_dashboard(fake: Fake) -> None:
    with connect(ComputeConfig()):
        assert fake.stopped == 0
    (options,) = fake.calls
    assert options["address"] == "local"
    assert options["num_cpus"] >= 4
    assert options["include_dashboard"] is False
    assert fake.stopped == 1


def test_a_number_of_cpus(fake: Fake) -> None:
    with connect(ComputeConfig(num_cpus=7)):
        pass
    assert fake.calls[0]["num_cpus"] == 7


def test_a_running_cluster_is_joined_as_it_is(fake: Fake) -> None:
    with connect(ComputeConfig(address="auto", num_cpus=7)):
        pass
    assert fake.calls[0]["address"] == "auto"
    assert "num_cpus" not in fake.calls[0]


def test_inside_a_submitted_job_rays_address_wins(fake: Fake) -> None:
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    with connect(ComputeConfig(address="local")):
        pass
    assert fake.calls[0]["address"] == "10.0.0.1:6379"
    assert "num_cpus" not in fake.calls[0]


def test_a_ray_that_is_there_is_used_and_left_running(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with connect(ComputeConfig()):
        pass
    assert (fake.calls, fake.stopped) == ([], 0)


def test_it_is_left_when_the_block_fails(fake: Fake) -> None:
    with pytest.raises(ValueError, match="inside"), connect(ComputeConfig()):
        raise ValueError("inside")
    assert fake.stopped == 1


SLOW = RuntimeError("The current node timed out during startup. This could happen because ...")


@pytest.mark.parametrize("fake", [(SLOW,)], indirect=True)
def test_a_busy_machine_has_a_second_try(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), connect(ComputeConfig()):
        pass
    assert len(fake.calls) == 2
    assert "once more" in caplog.text


@pytest.mark.parametrize(
    ("fake", "address", "calls"),
    [
        ((SLOW, SLOW), "local", 2),
        ((RuntimeError("no memory"),), "local", 1),
        ((SLOW,), "auto", 1),
    ],
    indirect=["fake"],
)
def test_what_is_not_tried_again(fake: Fake, address: str, calls: int) -> None:
    with pytest.raises(RuntimeError), connect(ComputeConfig(address=address)):
        pass
    assert len(fake.calls) == calls


@pytest.mark.usefixtures("ray_cluster")
def test_no_port_of_a_local_ray_is_open_to_other_machines() -> None:
    below = [os.getpid(), *descendants(os.getpid())]
    found = listening(below)
    assert len(found) > 4, "the core, the raylet and their agents listen somewhere"
    assert {address for address, _ in found} <= LOOPBACK


# As /proc/net prints them: 127.0.0.1, ::1 and ::ffff:127.0.0.1.
LOOPBACK = {"0100007F", f"{'0' * 24}01000000", f"{'0' * 16}FFFF00000100007F"}


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which one of the processes listens."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A":
                address, _, port = local.partition(":")
                sockets[f"socket:[{rest[5]}]"] = address, int(port, 16)
    found = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                found.add(sockets.get(str(file.readlink())))
    return {place for place in found if place is not None}
