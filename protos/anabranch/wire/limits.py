"""How much a message may claim before anything of it is unpacked.

Compressed data names its own size, and a 30 KB frame can claim a gigabyte: every length is
compared with a cap first. A receiver that knows the tensors to come derives the caps from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

TEXT_BYTES = 256
"""Names of a federation, run, client or codec: identifiers, not prose."""

HASH_BYTES = 32
"""sha256 of a base and of a start."""

DIGEST_BYTES = 16
"""Truncated sha256 of a payload; update.proto says why this is enough."""

NONCE_BYTES = 64
"""16 random bytes are usual; a full hash fits twice."""

KEY_BYTES = 64
"""Key ids and Ed25519 signatures are no longer."""

RANK = 8
"""Dimensions of a tensor."""

_MANIFEST_FIXED_BYTES = 4 * TEXT_BYTES + 2 * HASH_BYTES + NONCE_BYTES + 2 * KEY_BYTES + 256
"""All fields outside the frames at their largest, with tags and numbers."""

_MANIFEST_TENSOR_BYTES = 128
"""A tensor's row besides its name (8 dimensions and two counts of at most 5-10 bytes each), and
its frame's own fields where each tensor is a frame."""

_PAYLOAD_ENTRY_BYTES = 4
"""fp32 is the widest codec."""

_PAYLOAD_TENSOR_BYTES = 128
"""Block scales of short tensors, and zstd's headers where each tensor is a frame."""


@dataclass(frozen=True)
class Limits:
    """Caps on one message; the defaults are for readers that know no layout.

    Attributes:
        manifest_bytes: The manifest, decompressed. The default holds 5,000 tensors with long
            names; protobuf turns the worst such megabyte into 60 MB of objects.
        message_bytes: The whole message. The default is that of 16 billion fp32 entries: reading
            a manifest does not touch the payloads.
    """

    manifest_bytes: int = 1 << 20
    message_bytes: int = 64 << 30

    @property
    def header_bytes(self) -> int:
        """The header on the wire: zstd may enlarge what it cannot compress by 0.4%."""
        return self.manifest_bytes + (self.manifest_bytes >> 8) + 256


def limits_for(*layouts: Mapping[str, tuple[int, ...]]) -> Limits:
    """The tightest caps that every honest message of these tensors keeps.

    Args:
        layouts: Names and shapes from the local configuration: of the tensors, and of their
            importance where the message holds it.
    """
    tensors = [tensor for layout in layouts for tensor in layout.items()]
    names_bytes = sum(len(name.encode()) for name, _ in tensors)
    entries = sum(math.prod(shape) for _, shape in tensors)
    manifest = _MANIFEST_FIXED_BYTES + names_bytes + _MANIFEST_TENSOR_BYTES * len(tensors)
    payloads = _PAYLOAD_ENTRY_BYTES * entries + _PAYLOAD_TENSOR_BYTES * len(tensors)
    header = Limits(manifest, 0).header_bytes
    return Limits(manifest, 8 + header + payloads)
