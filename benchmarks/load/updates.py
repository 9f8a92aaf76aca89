"""What each client uploads, made while the clock runs at next to no cost. Loads no torch.

The payload of an update is the same for every client; its header, with name, nonce and signature,
is each one's own. So every message is one of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from anabranch.wire.header import read_manifest, write_header
from anabranch.wire.keys import PrivateKey, seeded_key
from anabranch.wire.manifest import Manifest

NAME, RUN, SEED = "load", "r", 7


def client_name(number: int) -> str:
    """What a client is called."""
    return f"client-{number:04}"


def client_key(number: int) -> PrivateKey:
    """What it signs with."""
    return seeded_key(client_name(number), SEED)


@dataclass(frozen=True)
class Updates:
    """The updates of one round.

    Attributes:
        manifest: Of the one that was really encoded.
        payload: What follows its header.
    """

    manifest: Manifest
    payload: bytes

    def header(self, number: int) -> bytes:
        """How a client's update begins."""
        name = client_name(number)
        nonce = hashlib.sha256(f"{self.manifest.meta.round} {name}".encode()).digest()[:16]
        meta = replace(self.manifest.meta, client=name, nonce=nonce)
        return write_header(replace(self.manifest, meta=meta), client_key(number))


def read_updates(path: Path) -> Updates:
    """The updates that go with one that was encoded."""
    blob = path.read_bytes()
    manifest = read_manifest(blob)
    return Updates(manifest, blob[len(blob) - manifest.payload_bytes :])
