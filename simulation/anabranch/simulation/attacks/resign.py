"""Rewrite the manifest of one's own message and sign it again: what any enrolled client can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from anabranch.client.trust import NodeKeys
from anabranch.wire.header import read_manifest, write_header
from anabranch.wire.manifest import Manifest


def resigned(blob: bytes, lie: Callable[[Manifest], Manifest], keys: NodeKeys | None) -> bytes:
    """A message under another manifest, its payloads as they were.

    Args:
        blob: The message.
        lie: What becomes of its manifest.
        keys: The sender's own; None leaves it unsigned.
    """
    manifest = read_manifest(blob)
    payloads = blob[manifest.payload_start :]
    changed = replace(lie(manifest), key_id=b"", signature=b"", signed=b"")
    return write_header(changed, keys.own if keys else None) + payloads
