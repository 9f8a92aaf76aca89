"""Update messages: tensors to bytes, and bytes from strangers back to tensors.

A message is a header with the manifest, then one payload per frame (``v1/update.proto``): of the
tensors, and of their importance where the round asks for it. Decoding
is bounded by the names and shapes of the local configuration before anything is decompressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anabranch.wire.codecs.codec import Codec, Form
from anabranch.wire.codecs.registry import codec_for, codec_numbered
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.frames import plan_frames
from anabranch.wire.header import read_manifest, write_header
from anabranch.wire.importance import IMPORTANCE, square_roots, squares
from anabranch.wire.keys import PrivateKey
from anabranch.wire.limits import DIGEST_BYTES, RANK, limits_for
from anabranch.wire.manifest import FrameInfo, Manifest, TensorInfo, UpdateMeta

Check = Callable[[Manifest], None]
"""Raises a WireError for a message whose manifest is not to be believed."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A message, and what its receiver will read from it.

    Attributes:
        blob: The message.
        sent: Decoded values by name, fp32, bit for bit those of ``decode_update``: error feedback
            subtracts them from what was meant.
    """

    blob: bytes
    sent: dict[str, Tensor]


def encode_update(
    tensors: Mapping[str, Tensor],
    meta: UpdateMeta,
    codec: CodecConfig,
    key: PrivateKey | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> Encoded:
    """Encode named tensors as one message.

    Args:
        tensors: Values by name, of any shape, floating dtype and device; read in fp32.
        meta: Whose update it is.
        codec: How to encode them.
        key: Who signs; None leaves the message unsigned.
        importance: How much their entries matter to the sender, zero or more, in the flat layout of
            ``vectors.importance``; None sends none.

    Raises:
        ValueError: There are no tensors, one has more than 8 dimensions, or an entry is NaN,
            infinite or beyond the codec's range; the tensor is named.
    """
    if not tensors:
        raise ValueError("there are no tensors to encode; give at least one")
    chosen = codec_for(codec)
    frames, payloads, sent = _pack_frames(tensors, chosen, codec)
    weighed, more, _ = _pack_frames(square_roots(importance or {}), IMPORTANCE, codec)
    header = write_header(Manifest(meta, chosen.name, frames, importance=weighed), key)
    return Encoded(b"".join([header, *payloads, *more]), sent)


def _pack_frames(
    tensors: Mapping[str, Tensor], chosen: Codec[Any], codec: CodecConfig
) -> tuple[tuple[FrameInfo, ...], list[bytes], dict[str, Tensor]]:
    """Rows of the manifest, payloads, and what a receiver will read, by name."""
    sent: dict[str, Tensor] = {}
    frames: list[FrameInfo] = []
    payloads: list[bytes] = []
    for names in plan_frames({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        forms: list[Form] = []
        for name in names:
            if tensors[name].ndim > RANK:
                raise ValueError(f"{name} has {tensors[name].ndim} dimensions, beyond {RANK}")
            try:
                forms.append(chosen.reduce(tensors[name], codec))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            sent[name] = forms[-1].dense()
        packed = chosen.pack(forms)
        rows = tuple(
            TensorInfo(
                name,
                tuple(tensors[name].shape),
                packed.nonzeros[row] if packed.nonzeros else None,
                packed.scales[row] if packed.scales else None,
            )
            for row, name in enumerate(names)
        )
        frames.append(
            FrameInfo(
                chosen.number, rows, packed.raw_bytes, len(packed.payload), _digest(packed.payload)
            )
        )
        payloads.append(packed.payload)
    return tuple(frames), payloads, sent


def decode_update(
    blob: bytes | memoryview, layout: Mapping[str, tuple[int, ...]], check: Check | None = None
) -> tuple[UpdateMeta, dict[str, Tensor]]:
    """Decode a message into dense tensors.

    Args:
        blob: The message, as it came.
        layout: Names and shapes expected, from the local configuration.
        check: Called with the manifest before any payload is touched (``wire.signing``).

    Returns:
        What the message says of itself, and fp32 tensors by name, in sorted order.

    Raises:
        WireError: The message is not a sound one of exactly this layout; ``code`` says why.
    """
    meta, tensors, _ = decode_weighed(blob, layout, {}, check)
    return meta, tensors


def decode_weighed(
    blob: bytes | memoryview,
    layout: Mapping[str, tuple[int, ...]],
    importance: Mapping[str, tuple[int, ...]],
    check: Check | None = None,
) -> tuple[UpdateMeta, dict[str, Tensor], dict[str, Tensor]]:
    """``decode_update`` of a message that also holds importance of this layout, or none if empty.

    Returns:
        What the message says of itself, the tensors, and their importance in the flat layout of
        ``vectors.importance``: finite, zero or more.
    """
    meta, forms, roots = _decode(blob, layout, importance, check)
    return meta, {name: form.dense() for name, form in forms.items()}, squares(roots)


def decode_forms(
    blob: bytes | memoryview, layout: Mapping[str, tuple[int, ...]], check: Check | None = None
) -> tuple[UpdateMeta, dict[str, Form]]:
    """``decode_update``, leaving each tensor in its codec's form: sparse ones stay sparse."""
    meta, forms, _ = _decode(blob, layout, {}, check)
    return meta, forms


def _decode(
    blob: bytes | memoryview,
    layout: Mapping[str, tuple[int, ...]],
    importance: Mapping[str, tuple[int, ...]],
    check: Check | None,
) -> tuple[UpdateMeta, dict[str, Form], dict[str, Form]]:
    manifest = read_manifest(blob, limits_for(layout, importance))
    if check is not None:
        check(manifest)
    if bool(manifest.importance) != bool(importance):
        asked = "not asked for" if manifest.importance else "missing"
        raise WireError("importance", f"the importance of the update is {asked}")
    _check_layout(manifest.frames, layout)
    _check_layout(manifest.importance, importance)
    payloads = memoryview(blob)[manifest.payload_start :]
    forms, used = _unpack_frames(manifest.frames, payloads, manifest.codec)
    roots, _ = _unpack_frames(manifest.importance, payloads[used:], IMPORTANCE.name)
    return manifest.meta, forms, roots


def _unpack_frames(
    frames: Sequence[FrameInfo], payloads: memoryview, announced: str
) -> tuple[dict[str, Form], int]:
    """Forms by name, and how many bytes of the payloads they were."""
    forms: dict[str, Form] = {}
    start = 0
    for frame in frames:
        codec = codec_numbered(frame.codec)
        if codec.name != announced:
            raise WireError(
                "codec", f"a frame is {codec.name}, the manifest announces {announced!r}"
            )
        payload = payloads[start : start + frame.payload_bytes]
        start += frame.payload_bytes
        if _digest(payload) != frame.digest:
            raise WireError("digest", f"the payload of {_label(frame)} does not match its digest")
        try:
            unpacked = codec.unpack(payload, frame)
        except WireError as error:
            raise WireError(error.code, f"{_label(frame)}: {error}") from None
        forms.update(zip((row.name for row in frame.tensors), unpacked, strict=True))
    return forms, start


def _check_layout(frames: Sequence[FrameInfo], layout: Mapping[str, tuple[int, ...]]) -> None:
    """Names, shapes and frames must be exactly those the layout gives."""
    plan = plan_frames(layout)
    if len(plan) != len(frames):
        raise WireError("layout", f"the message has {len(frames)} frames, expected {len(plan)}")
    for names, frame in zip(plan, frames, strict=True):
        if names != [row.name for row in frame.tensors]:
            odd = sorted(set(names) ^ {row.name for row in frame.tensors})[:3]
            raise WireError(
                "layout", f"the message has other tensors than expected; they differ in {odd}"
            )
        for row in frame.tensors:
            if row.shape != tuple(layout[row.name]):
                raise WireError(
                    "layout",
                    f"{row.name} has shape {row.shape}, expected {tuple(layout[row.name])}",
                )


def _label(frame: FrameInfo) -> str:
    return f"the frame of {frame.tensors[0].name}"


def _digest(payload: bytes | memoryview) -> bytes:
    return hashlib.sha256(payload).digest()[:DIGEST_BYTES]
