"""Which images make which shard of features, decided before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import JsonValue

from pipelines.backbones.pixel_pass import Identity
from pipelines.config import digest
from pipelines.data.shards import cut
from pipelines.data.sources import Source
from pipelines.records import Record


class FeatureIdentity(Record):
    """Everything that changes a byte of the features of one source.

    Attributes:
        backbone: the fields that decide a feature (`pipelines.backbones.network.identity`).
        device: cpu or cuda.
        settings: the fields of `EmbedConfig` that change a feature, by name.
        pixel_pass: what is encoded in place of the images as they are.
        source: the fingerprint of the images.
        keys: `all`, or a digest of those that were chosen.
        code: the digest of what computes.
    """

    backbone: dict[str, str]
    device: str
    settings: dict[str, bool | int | float | str]
    pixel_pass: Identity | None = None
    source: str
    keys: str
    code: str

    @property
    def content(self) -> dict[str, JsonValue]:
        """What the address is a digest of, and the manifest keeps."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def address(self) -> str:
        """The address of the features."""
        return digest(self.content)


@dataclass(frozen=True)
class Plan:
    """The shards of one source, before any work."""

    name: str
    source: Source
    identity: FeatureIdentity
    shards: tuple[tuple[str, ...], ...]

    @cached_property
    def address(self) -> str:
        """The address of the features."""
        return self.identity.address

    @property
    def total(self) -> int:
        """All images."""
        return sum(map(len, self.shards))


def make_plan(
    name: str,
    source: Source,
    identity: FeatureIdentity,
    *,
    keys: Sequence[str] | None,
    shard_rows: int,
) -> Plan:
    """Cut a source, or `keys` of it, into shards of at most `shard_rows` keys in order.

    Args:
        name: of the source, for messages.
        source: the images.
        identity: what goes into the address.
        keys: which images; all where None.
        shard_rows: images of a shard.

    Raises:
        UserError: for an empty source, one with a key that does not name one image, and for a
            key chosen twice or unknown.
    """
    return Plan(
        name=name,
        source=source,
        identity=identity,
        shards=cut(name, source, keys=keys, shard_rows=shard_rows),
    )
