"""Where an adapter is pushed to, as a word says it: ``oci:FOLDER[:TAG]`` or ``hub:FOLDER``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.lineage import Published
from anabranch.coordinator.pushing import oci
from anabranch.wire.receipt import receipt_hash


@dataclass(frozen=True)
class Target:
    """A place.

    Attributes:
        kind: ``oci`` or ``hub``.
        folder: The layout's folder, or the repository's.
        tag: In a layout; None where none is said.
    """

    kind: str
    folder: Path
    tag: str | None


def read_target(text: str) -> Target:
    """The place a word names.

    Raises:
        ValueError: It names none.
    """
    kind, _, rest = text.partition(":")
    tag: str | None = None
    if kind == "oci":
        folder, colon, last = rest.rpartition(":")
        # A colon within a folder's name is none before a tag.
        if colon and "/" not in last:
            rest, tag = folder, last
    if kind not in ("oci", "hub") or not rest or tag == "":
        raise ValueError(f"{text[:100]!r} is no target: give oci:FOLDER[:TAG] or hub:FOLDER")
    if tag is not None and not oci.TAG.fullmatch(tag):
        raise ValueError(f"{tag[:80]!r} is no tag of a registry: give A-Z a-z 0-9 _ . -")
    return Target(kind, Path(rest), tag)


def labels(config: FederationConfig, row: Published) -> dict[str, str]:
    """What a manifest says of an adapter: of when it was made, not of when it was pushed."""
    said = {
        "org.opencontainers.image.title": f"{config.name}, round {row.publication.round}",
        "anabranch.adapter-hash": row.publication.adapter_hash,
        "anabranch.federation": config.name,
        "anabranch.run": config.run,
        "anabranch.round": str(row.publication.round),
    }
    read = row.read
    if read is not None and row.receipt is not None:
        when = datetime.fromtimestamp(read.time_s, UTC)
        said[oci.CREATED] = when.strftime("%Y-%m-%dT%H:%M:%SZ")
        said["anabranch.base-hash"] = read.base_hash
        said["anabranch.receipt"] = receipt_hash(row.receipt)
    return said
