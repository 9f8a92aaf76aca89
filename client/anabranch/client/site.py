"""Who a client is, by its node's own configuration. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anabranch.wire.plan import Scalar


@dataclass(frozen=True)
class Site:
    """Who this client is: its name and which part of the data it holds.

    Attributes:
        name: Name in the federation; the node's configuration may set it (``client``).
        partition: Index of its part of the data (``partition-id``); 0 when there is one part.
    """

    name: str
    partition: int


def client_name(partition: int) -> str:
    """The name of a client that was given none."""
    return f"client-{partition:04d}"


def site_of(node_config: Mapping[str, Scalar]) -> Site:
    """Read a node's own configuration."""
    partition = int(node_config.get("partition-id", 0))
    return Site(str(node_config.get("client", client_name(partition))), partition)
