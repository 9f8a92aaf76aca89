"""The header of a message: length, magic and compressed manifest, written and read.

Reading one needs no torch, touches no payload, and believes no length before it is compared.
"""

from __future__ import annotations

from itertools import accumulate

from google.protobuf.message import DecodeError

from anabranch.wire import zstd
from anabranch.wire.errors import WireError
from anabranch.wire.keys import PrivateKey
from anabranch.wire.limits import DIGEST_BYTES, KEY_BYTES, RANK, TEXT_BYTES, Limits
from anabranch.wire.manifest import FrameInfo, Kind, Manifest, TensorInfo, UpdateMeta
from anabranch.wire.signing import MESSAGE
from anabranch.wire.v1 import update_pb2 as pb

FORMAT_VERSION = 1
MAGIC = b"ANBR"
LENGTH_BYTES = 8

_KINDS: dict[Kind, pb.Kind.ValueType] = {
    "update": pb.KIND_UPDATE,
    "adapter": pb.KIND_ADAPTER,
    "change": pb.KIND_CHANGE,
}


def write_header(manifest: Manifest, key: PrivateKey | None = None) -> bytes:
    """Length, magic and compressed manifest: what a message starts with.

    Args:
        manifest: What to write; its signature is made here.
        key: Who signs; None leaves the message unsigned.
    """
    meta = manifest.meta
    message = pb.Manifest(
        format_version=FORMAT_VERSION,
        kind=_KINDS[meta.kind],
        federation=meta.federation,
        run=meta.run,
        round=meta.round,
        client=meta.client,
        base_hash=bytes.fromhex(meta.base_hash),
        start_hash=bytes.fromhex(meta.start_hash),
        nonce=meta.nonce,
        a0_seed=meta.seed,
        issued_s=meta.issued_s,
        examples=meta.examples,
        codec=manifest.codec,
        frames=[_frame_message(frame) for frame in manifest.frames],
        importance=[_frame_message(frame) for frame in manifest.importance],
        key_id=key.public.id if key else b"",
    )
    raw = message.SerializeToString(deterministic=True)
    if key is not None:
        raw += _signature_field(key.sign(MESSAGE + raw))
    header = MAGIC + zstd.compress_text(raw)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def read_manifest(blob: bytes | memoryview, limits: Limits | None = None) -> Manifest:
    """Read a message's manifest and check that it is sound in itself.

    Args:
        blob: The whole message.
        limits: Caps to hold it to; ``Limits()`` when None.

    Raises:
        WireError: The message is cut, too large, no message, of another version or contradictory.
    """
    limits = limits or Limits()
    if len(blob) > limits.message_bytes:
        raise WireError(
            "too-large", f"the message has {len(blob)} bytes, more than {limits.message_bytes}"
        )
    if len(blob) < LENGTH_BYTES:
        raise WireError("truncated", f"the message ends after {len(blob)} bytes")
    header_bytes = int.from_bytes(blob[:LENGTH_BYTES], "little")
    if header_bytes > limits.header_bytes:
        raise WireError(
            "too-large", f"the header has {header_bytes} bytes, more than {limits.header_bytes}"
        )
    start = LENGTH_BYTES + header_bytes
    if len(blob) < start:
        raise WireError("truncated", f"the message has {len(blob)} bytes, its header {start}")
    header = memoryview(blob)[LENGTH_BYTES:start]
    if bytes(header[: len(MAGIC)]) != MAGIC:
        raise WireError("magic", "not an Anabranch message: the magic bytes are missing")
    raw = zstd.decompress(header[len(MAGIC) :], 1, limits.manifest_bytes, "manifest")
    try:
        message = pb.Manifest.FromString(raw)
    except DecodeError as error:
        raise WireError("manifest", f"the manifest is not a valid protobuf: {error}") from None
    if message.format_version != FORMAT_VERSION:
        raise WireError(
            "version",
            f"the message has format version {message.format_version}, "
            f"this release reads {FORMAT_VERSION}; upgrade the older side",
        )
    manifest = _from_message(message, start, raw)
    end = start + manifest.payload_bytes
    if len(blob) < end:
        raise WireError("truncated", f"the message has {len(blob)} of {end} bytes")
    if len(blob) > end:
        raise WireError("trailing", f"{len(blob) - end} bytes follow the last payload")
    return manifest


def _frame_message(frame: FrameInfo) -> pb.Frame:
    tensors = frame.tensors
    return pb.Frame(
        codec=frame.codec,  # type: ignore[arg-type]  # the number of a known codec
        names=[tensor.name for tensor in tensors],
        ranks=[len(tensor.shape) for tensor in tensors],
        dims=[size for tensor in tensors for size in tensor.shape],
        nonzeros=[tensor.nonzeros for tensor in tensors if tensor.nonzeros is not None],
        scales=[tensor.scale for tensor in tensors if tensor.scale is not None],
        entries=frame.entries,
        raw_bytes=frame.raw_bytes,
        payload_bytes=frame.payload_bytes,
        digest=frame.digest,
    )


def _signature_field(signature: bytes) -> bytes:
    """The field as protobuf writes it. It has the highest number, and so stands last."""
    return pb.Manifest(signature=signature).SerializeToString()


def _from_message(message: pb.Manifest, start: int, raw: bytes) -> Manifest:
    kinds = {number: kind for kind, number in _KINDS.items()}
    if message.kind not in kinds:
        raise WireError("meta", f"the message is of unknown kind {message.kind}")
    try:
        meta = UpdateMeta(
            kind=kinds[message.kind],
            base_hash=message.base_hash.hex(),
            start_hash=message.start_hash.hex(),
            federation=message.federation,
            run=message.run,
            round=message.round,
            client=message.client,
            nonce=message.nonce,
            seed=message.a0_seed if message.HasField("a0_seed") else None,
            examples=message.examples,
            issued_s=message.issued_s,
        )
    except ValueError as error:
        raise WireError("meta", str(error)) from None
    for field, value in (("key_id", message.key_id), ("signature", message.signature)):
        if len(value) > KEY_BYTES:
            raise WireError("meta", f"{field} has {len(value)} bytes, more than {KEY_BYTES}")
    if len(message.codec.encode()) > TEXT_BYTES:
        raise WireError("meta", f"the codec's name is longer than {TEXT_BYTES} bytes")
    frames = tuple(_frame_info(frame) for frame in message.frames)
    importance = tuple(_frame_info(frame) for frame in message.importance)
    # A signature that stands elsewhere than at the end covers nothing, and so is a bad one.
    tail = _signature_field(message.signature)
    signed = raw.removesuffix(tail) if raw.endswith(tail) else b""
    key_id, signature = message.key_id, message.signature
    return Manifest(
        meta, message.codec, frames, start, key_id, signature, signed, importance=importance
    )


def _frame_info(frame: pb.Frame) -> FrameInfo:
    # Lists, since each look into a field of protobuf's makes an object.
    names, ranks, dims = list(frame.names), list(frame.ranks), list(frame.dims)
    nonzeros: list[int | None] = list(frame.nonzeros)
    scales: list[float | None] = list(frame.scales)
    count = len(names)
    if not nonzeros and not scales:
        nonzeros, scales = [None] * count, [None] * count
    if any(len(column) != count for column in (ranks, nonzeros, scales)):
        raise WireError("manifest", "a frame's columns differ in length")
    if sum(ranks) != len(dims) or any(rank > RANK for rank in ranks):
        raise WireError("manifest", f"a frame's ranks do not add up, or one is beyond {RANK}")
    if len(frame.digest) != DIGEST_BYTES:
        raise WireError("manifest", f"a digest has {len(frame.digest)} bytes, not {DIGEST_BYTES}")
    ends = accumulate(ranks)
    shapes = [tuple(dims[end - rank : end]) for rank, end in zip(ranks, ends, strict=True)]
    tensors = tuple(map(TensorInfo, names, shapes, nonzeros, scales))
    info = FrameInfo(frame.codec, tensors, frame.raw_bytes, frame.payload_bytes, frame.digest)
    if info.entries != frame.entries:
        raise WireError("counts", f"a frame claims {frame.entries} entries, not {info.entries}")
    return info
