"""What a fuzzer calls: an input is decoded as something that came over a network.

The first byte says by which door it comes in. Behind most doors lengths, digests, checksums and
seals are put right first: blind damage would hardly ever get past them, and an attacker's does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import zstandard
from google.protobuf.message import DecodeError
from torch import Tensor

from anabranch.vectors import Adapter, LoraFactors, seeded_start
from anabranch.wire import (
    CodecConfig,
    UpdateMeta,
    WireError,
    decode_adapter,
    decode_forms,
    decode_update,
    encode_update,
    zstd,
)
from anabranch.wire.header import LENGTH_BYTES, MAGIC, read_manifest
from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.sealing import new_seal_key, seal
from anabranch.wire.signing import KeyRing, check_message
from anabranch.wire.v1 import update_pb2 as pb
from fuzz import receipts, secure

KNOWN = seeded_start(
    Adapter({"m": LoraFactors(torch.zeros(2, 30), torch.zeros(20, 2), 4.0)}, {"h": torch.ones(3)}),
    1,
)
LAYOUT = {name: tuple(tensor.shape) for name, tensor in KNOWN.tensors().items()}
SPARSE: dict[str, tuple[int, ...]] = {"x": (4000,)}
RANKED: dict[str, tuple[int, ...]] = {"x": (40,), "y": (3,)}
IMPORTANCE = {"m.rows": (20,), "m.columns": (30,)}
CODECS = (
    CodecConfig(density=0.2),
    CodecConfig(density=0.8),
    CodecConfig(name="two-bit", density=0.2),
    CodecConfig(name="dense", dtype="fp32"),
    CodecConfig(name="dense", dtype="bf16"),
    CodecConfig(name="dense", dtype="int8"),
    CodecConfig(name="dense", dtype="int4"),
    CodecConfig(name="sign"),
    CodecConfig(name="rotated", bits=3),
    CodecConfig(name="axes"),
    CodecConfig(name="dare", density=0.4, feedback=0),
    CodecConfig(name="ranks"),
)
RING = KeyRing(by_id([seeded_key("c", 1).public]))
_SEAL = new_seal_key()


def consume(data: bytes) -> str:
    """Decode one input.

    Returns:
        The code of the refusal, or "decoded".

    Raises:
        Exception: Anything but a WireError, or a result that should have been refused: a finding.
    """
    door = DOORS[data[0] % len(DOORS)] if data else _as_it_came
    try:
        tensors, layout = door(data[1:])
    except WireError as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) <= 300, text
        return error.code
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layout
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    return "decoded"


Decoded = tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]


def _as_it_came(data: bytes) -> Decoded:
    return decode_update(data, LAYOUT)[1], LAYOUT


def _forged(data: bytes) -> Decoded:
    return decode_update(message_of(data), LAYOUT)[1], LAYOUT


def _weighed(data: bytes) -> Decoded:
    _, forms, importance = decode_forms(message_of(data), LAYOUT, IMPORTANCE)
    tensors = {name: form.dense() for name, form in forms.items()}
    assert all(bool((tensor >= 0).all()) for tensor in importance.values())
    return {**tensors, **importance}, {**LAYOUT, **IMPORTANCE}


def _signed(data: bytes) -> Decoded:
    manifest = read_manifest(message_of(data))
    check_message(manifest, RING, "c")
    return {}, {}


def _adapter(data: bytes) -> Decoded:
    adapter = decode_adapter(message_of(data), KNOWN, "both")
    tensors = adapter.tensors()
    return tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _sealed(data: bytes) -> Decoded:
    message = data if data[:1] == b"\0" else seal(data, _SEAL.public)
    return decode_update(_SEAL.open(message, 1 << 16), LAYOUT)[1], LAYOUT


def _runs(data: bytes) -> Decoded:
    """Runs and signs of a sparse frame, below zstd: the first byte says how many non-zeros."""
    count = data[0] if data else 0
    signs = data[1 : 1 + -(-count // 8)]
    runs = data[1 + len(signs) :]
    manifest = pb.Manifest.FromString(_SPARSE)
    frame = manifest.frames[0]
    frame.codec = pb.CODEC_TERNARY
    frame.nonzeros[0], frame.raw_bytes = count, len(runs) + len(signs)
    raw = manifest.SerializeToString()
    payload = zstd.compress_symbols(runs) + signs
    return decode_update(message_of(_packed(raw, payload)), SPARSE)[1], SPARSE


def _draws(data: bytes) -> Decoded:
    """Coded draws and signs of a sparse frame: two bytes say how many non-zeros and run bytes."""
    count, runs = (data[0], data[1]) if len(data) > 1 else (0, 0)
    manifest = pb.Manifest.FromString(_SPARSE)
    frame = manifest.frames[0]
    frame.codec = pb.CODEC_TERNARY_DRAWS
    frame.nonzeros[0], frame.raw_bytes = count, runs + -(-count // 8)
    raw = manifest.SerializeToString()
    return decode_update(message_of(_packed(raw, data[2:])), SPARSE)[1], SPARSE


def _ranks(data: bytes) -> Decoded:
    """Steps, zeros, a permutation and signs, of the length that they must have."""
    manifest = pb.Manifest.FromString(_RANKS)
    length = manifest.frames[0].raw_bytes
    payload = data[:length].ljust(length, b"\0")
    return decode_update(message_of(_packed(_RANKS, payload)), RANKED)[1], RANKED


def _of_a_member(data: bytes) -> Decoded:
    secure.said_by_a_member(data)
    return {}, {}


def _to_a_member(data: bytes) -> Decoded:
    secure.said_to_a_member(data)
    return {}, {}


def _receipt(data: bytes) -> Decoded:
    receipts.written_by_a_coordinator(data)
    return {}, {}


DOORS: tuple[Callable[[bytes], Decoded], ...] = (
    _as_it_came,
    _forged,
    _weighed,
    _signed,
    _adapter,
    _sealed,
    _runs,
    _draws,
    _of_a_member,
    _to_a_member,
    _ranks,
    _receipt,
)


def message_of(data: bytes) -> bytes:
    """A message of a manifest's bytes (a length of two bytes before them) and payloads behind.

    Lengths and digests of the payloads are made to agree, where the manifest can be read.
    """
    length = int.from_bytes(data[:2], "little")
    raw, payloads = data[2 : 2 + length], data[2 + length :]
    try:
        manifest = pb.Manifest.FromString(raw)
    except DecodeError:
        pass
    else:
        frames = [*manifest.frames, *manifest.importance]
        start = 0
        for number, frame in enumerate(frames):
            last = number == len(frames) - 1
            size = len(payloads) if last else min(frame.payload_bytes, 1 << 20)
            payload = payloads[start : start + size]
            start += len(payload)
            digest = hashlib.sha256(payload).digest()[:16]
            if len(frame.digest) == 16 and digest != frame.digest:
                frame.payload_bytes, frame.digest = len(payload), digest
                raw = b""
        raw = raw or manifest.SerializeToString()
    header = MAGIC + zstandard.ZstdCompressor(level=1, write_checksum=True).compress(raw)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + payloads


def seeds() -> list[bytes]:
    """Sound inputs for every door and codec, to start from."""
    found: list[bytes] = []
    for codec in CODECS:
        blob = _blob(codec)
        found += [b"\0" + blob, b"\5" + blob]
        found += [bytes([door]) + _opened(blob) for door in (1, 3, 4)]
        found.append(b"\2" + _opened(_blob(codec, weighed=True)))
    found.append(bytes([6, 9, 0x55, 1]) + bytes([3, 255, 7, 0, 0, 1, 254, 9, 30, 2]))
    (frame,) = pb.Manifest.FromString(_SPARSE).frames
    count, runs = frame.nonzeros[0], frame.raw_bytes - -(-frame.nonzeros[0] // 8)
    found.append(bytes([7, count, runs]) + _SPARSE_PAYLOAD)
    of_members, to_members = secure.seeds()
    found += [b"\x08" + seed for seed in of_members]
    found += [b"\x09" + seed for seed in to_members]
    found.append(b"\x0a" + _RANKS_PAYLOAD)
    found += [b"\x0b" + seed for seed in receipts.seeds()]
    return found


def _blob(codec: CodecConfig, weighed: bool = False) -> bytes:
    generator = torch.Generator().manual_seed(3)
    meta = UpdateMeta("update", "ab" * 32, "cd" * 32, "f", "r", 1, "c", b"n" * 16, 1, 9, 7)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in LAYOUT.items()}
    importance = {
        name: torch.rand(shape, generator=generator) for name, shape in IMPORTANCE.items()
    }
    return encode_update(
        tensors, meta, codec, seeded_key("c", 1), importance if weighed else None
    ).blob


def _opened(blob: bytes) -> bytes:
    return _packed(_manifest_of(blob), blob[read_manifest(blob).payload_start :])


def _manifest_of(blob: bytes) -> bytes:
    header = blob[LENGTH_BYTES + len(MAGIC) : read_manifest(blob).payload_start]
    return zstd.decompress(header, 1, 1 << 20, "manifest")


def _packed(raw: bytes, payloads: bytes) -> bytes:
    return len(raw).to_bytes(2, "little") + raw + payloads


_SPARSE_BLOB = encode_update(
    {"x": torch.ones(4000)},
    UpdateMeta("update", "ab" * 32, "", "f", "r", 1, "c", b"", 1, 9),
    CodecConfig(density=0.01),
).blob
_SPARSE = _manifest_of(_SPARSE_BLOB)
_SPARSE_PAYLOAD = _SPARSE_BLOB[read_manifest(_SPARSE_BLOB).payload_start :]
_RANKS_BLOB = encode_update(
    {name: torch.arange(1.0, 1 + size[0]) for name, size in RANKED.items()},
    UpdateMeta("update", "ab" * 32, "", "f", "r", 1, "c", b"", 1, 9),
    CodecConfig(name="ranks"),
).blob
_RANKS = _manifest_of(_RANKS_BLOB)
_RANKS_PAYLOAD = _RANKS_BLOB[read_manifest(_RANKS_BLOB).payload_start :]
