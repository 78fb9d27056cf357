"""Networks that are damaged after their stage was done, as the stage that reads them finds them."""

from __future__ import annotations

import logging

import pytest

from tests.kept.test_every_kept_file import DAMAGES, address, another, by_kind
from tests.kept.test_kept_networks import CACHE, Trained, told, trained, whole  # noqa: F401

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_network_that_was_damaged_since_is_not_embedded(
    whole: Trained,  # noqa: F811
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its stage counts as done: who reads it finds the damage, and the stage is repeated."""
    (path,) = by_kind(whole.root, CACHE)["network"]
    DAMAGES[damage](path, another(path, [path]))
    with caplog.at_level(logging.WARNING):
        whole.again(last="embed")
    assert whole.differing() == []
    assert damage == "delete" or any(address(path) in line for line in told(caplog))
