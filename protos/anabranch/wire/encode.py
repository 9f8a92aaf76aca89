"""Update messages: named tensors to bytes.

A message is a header with the manifest, then one payload per frame (``v1/update.proto``): of the
tensors, and of their importance where the round asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anabranch.wire.budget import within
from anabranch.wire.codecs.codec import Codec, Form
from anabranch.wire.codecs.registry import codec_for
from anabranch.wire.config import CodecConfig
from anabranch.wire.frames import plan_frames
from anabranch.wire.header import write_header
from anabranch.wire.importance import IMPORTANCE, square_roots
from anabranch.wire.keys import PrivateKey
from anabranch.wire.limits import RANK
from anabranch.wire.manifest import FrameInfo, Manifest, TensorInfo, UpdateMeta, payload_digest
from anabranch.wire.seeds import seed_of


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
    if codec.budget_bytes is None:
        return _encode(tensors, meta, codec, key, importance, {})
    return within(
        codec.budget_bytes,
        tensors,
        codec,
        lambda densities: _encode(tensors, meta, codec, key, importance, densities),
    )


def _encode(
    tensors: Mapping[str, Tensor],
    meta: UpdateMeta,
    codec: CodecConfig,
    key: PrivateKey | None,
    importance: Mapping[str, Tensor] | None,
    densities: Mapping[str, float],
) -> Encoded:
    """``encode_update``, at the densities given where they differ from the configuration's."""
    chosen = codec_for(codec)
    own = {
        name: codec.model_copy(update={"density": density}) for name, density in densities.items()
    }
    if chosen.level is not None:
        own.update(chosen.level(tensors, codec))
    frames, payloads, sent = _pack_frames(tensors, chosen, codec, meta, own)
    weighed, more, _ = _pack_frames(square_roots(importance or {}), IMPORTANCE, codec, meta, {})
    header = write_header(Manifest(meta, chosen.name, frames, importance=weighed), key)
    return Encoded(b"".join([header, *payloads, *more]), sent)


def _pack_frames(
    tensors: Mapping[str, Tensor],
    chosen: Codec[Any],
    codec: CodecConfig,
    meta: UpdateMeta,
    own: Mapping[str, CodecConfig],
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
                seed = seed_of(meta, name)
                forms.append(chosen.reduce(tensors[name], own.get(name, codec), seed))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            sent[name] = forms[-1].dense()
        number, packed = chosen.pack(forms)
        rows = tuple(
            TensorInfo(
                name,
                tuple(tensors[name].shape),
                packed.nonzeros[row] if packed.nonzeros else None,
                packed.scales[row] if packed.scales else None,
            )
            for row, name in enumerate(names)
        )
        payload = packed.payload
        frames.append(
            FrameInfo(number, rows, packed.raw_bytes, len(payload), payload_digest(payload))
        )
        payloads.append(payload)
    return tuple(frames), payloads, sent
