"""The manifest: what a message says about itself before its payloads, as plain values."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from anabranch.wire.limits import DIGEST_BYTES, HASH_BYTES, NONCE_BYTES, TEXT_BYTES

Kind = Literal["update", "adapter", "change"]


@dataclass(frozen=True)
class UpdateMeta:
    """Whose update a message is, and of what.

    Attributes:
        kind: ``update`` for a client's change, ``adapter`` for an adapter's values, ``change`` for
            what a coordinator adds to them.
        base_hash: ``weights_hash`` of the base, 64 hexadecimal digits.
        start_hash: The same of the adapter the differences are taken against; empty for none.
        federation: Name of the federation.
        run: Name of the run.
        round: Round number, from 0.
        client: Name of the sender.
        nonce: Up to 64 bytes that no other message carries.
        seed: What A was drawn from, where A - A0 travels; None where A travels whole.
        examples: Training examples behind the update, as the sender claims.
        issued_s: When the message was made, in Unix seconds, as the sender claims; 0 for unsaid.
    """

    kind: Kind
    base_hash: str
    start_hash: str
    federation: str
    run: str
    round: int
    client: str
    nonce: bytes
    seed: int | None
    examples: int
    issued_s: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; give one of {', '.join(get_args(Kind))}")
        for field in ("federation", "run", "client"):
            if len(getattr(self, field).encode()) > TEXT_BYTES:
                raise ValueError(f"{field} is longer than {TEXT_BYTES} bytes; shorten it")
        _check_hash("base_hash", self.base_hash)
        if self.start_hash:
            _check_hash("start_hash", self.start_hash)
        if len(self.nonce) > NONCE_BYTES:
            raise ValueError(f"nonce has {len(self.nonce)} bytes; give at most {NONCE_BYTES}")
        bits = {"round": 32, "examples": 64, "issued_s": 64, "seed": 64}
        for field, width in bits.items():
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1 << width:
                raise ValueError(f"{field} is {value}; give a number of 0 to 2^{width} - 1")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a frame.

    Attributes:
        name: Its name in the layout.
        shape: Its shape.
        nonzeros: Entries that are not zero; None where the codec is not sparse.
        scale: What each of them weighs, an fp32 value; None where the codec is not sparse.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int | None = None
    scale: float | None = None

    @property
    def entries(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FrameInfo:
    """One frame: consecutive tensors encoded together.

    Attributes:
        codec: Number of the codec, see update.proto.
        tensors: What it holds, in order.
        raw_bytes: Length before compression.
        payload_bytes: Length in the message.
        digest: First 16 bytes of the payload's sha256.
    """

    codec: int
    tensors: tuple[TensorInfo, ...]
    raw_bytes: int
    payload_bytes: int
    digest: bytes

    @cached_property
    def entries(self) -> int:
        """Entries of all its tensors."""
        return sum([math.prod(tensor.shape) for tensor in self.tensors])


@dataclass(frozen=True)
class Manifest:
    """All that a message says before its payloads.

    Attributes:
        meta: Whose update it is.
        codec: Name of the codec the sender was configured with.
        frames: What follows, in order.
        importance: What follows that: square roots of how much entries matter to the client.
        payload_start: Bytes before the first payload; 0 in a manifest not yet written.
        key_id: Names the key that signed (``wire.keys``); empty where none did.
        signature: That key's; empty where none signed.
        signed: The bytes that were read and that the signature has to cover; empty in a manifest
            not yet written.
    """

    meta: UpdateMeta
    codec: str
    frames: tuple[FrameInfo, ...]
    payload_start: int = 0
    key_id: bytes = b""
    signature: bytes = b""
    signed: bytes = b""
    importance: tuple[FrameInfo, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole message."""
        return self.payload_start + self.payload_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of all payloads."""
        return sum(frame.payload_bytes for frame in (*self.frames, *self.importance))


def payload_digest(payload: bytes | memoryview) -> bytes:
    """``FrameInfo.digest`` of a payload."""
    return hashlib.sha256(payload).digest()[:DIGEST_BYTES]


def _check_hash(field: str, text: str) -> None:
    # fromhex skips spaces and takes capitals: compare, so that a hash has one spelling.
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != HASH_BYTES or value.hex() != text:
        raise ValueError(
            f"{field} is {text[:80]!r}; give the {2 * HASH_BYTES} lower-case hexadecimal digits "
            "of a weights_hash"
        )
