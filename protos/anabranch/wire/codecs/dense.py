"""Every entry, at 32, 16, 8 or 4 bits. Payloads are the values as they are: nothing to blow up.

Shape legend: n entries of a tensor or a frame, g blocks of a quantised form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.vectors.quantised import INT4, INT8, Blocks, blocks_of, quantise
from anabranch.wire.codecs.codec import Codec, Packed, Packing
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb


@dataclass(frozen=True, eq=False)
class Plain:
    """A tensor as its values.

    Attributes:
        values: fp32 or bf16, of the tensor's shape.
    """

    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.values.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, in fp32."""
        return self.values.float()

    def norm(self) -> float:
        """‖·‖₂ in fp64."""
        return float(torch.linalg.vector_norm(self.values, dtype=torch.float64))


def _reduce_plain(tensor: Tensor, config: CodecConfig, seed: int, dtype: torch.dtype) -> Plain:
    # A copy even where nothing is rounded: what was sent must not change with the sender's tensor.
    values = tensor.detach().to("cpu", dtype, copy=True)
    if not _all_finite(values):
        raise ValueError(
            f"the tensor holds entries that are NaN, infinite or beyond {dtype}: "
            "the training diverged"
        )
    return Plain(values)


def _all_finite(values: Tensor) -> bool:
    """Whether every entry is a number; the extremes are taken in one pass, and NaN spreads."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)


def _pack_plain(forms: Sequence[Plain]) -> Packed:
    payload = b"".join(_to_bytes(form.values) for form in forms)
    return Packed(payload, len(payload))


def _unpack_plain(
    payload: memoryview, frame: FrameInfo, seeds: Sequence[int], dtype: torch.dtype
) -> list[Plain]:
    check_lengths(payload, frame, frame.entries * dtype.itemsize)
    values_n = _from_bytes(payload, dtype)
    if not _all_finite(values_n):
        raise WireError("values", "a frame holds NaN or infinite values")
    parts = torch.split(values_n, [tensor.entries for tensor in frame.tensors])
    return [
        Plain(part.reshape(tensor.shape)) for part, tensor in zip(parts, frame.tensors, strict=True)
    ]


def _reduce_blocks(tensor: Tensor, config: CodecConfig, seed: int, largest: int) -> Blocks:
    return quantise(tensor, largest)


def _pack_blocks(forms: Sequence[Blocks], largest: int) -> Packed:
    scales = b"".join(_to_bytes(form.scales_g) for form in forms)
    levels_n = torch.cat([form.levels_n for form in forms])
    payload = scales + _to_bytes(levels_n if largest == INT8 else _nibbles(levels_n))
    return Packed(payload, len(payload))


def _unpack_blocks(
    payload: memoryview, frame: FrameInfo, seeds: Sequence[int], largest: int
) -> list[Blocks]:
    counts = [blocks_of(tensor.entries) for tensor in frame.tensors]
    scale_bytes = 4 * sum(counts)
    level_bytes = frame.entries if largest == INT8 else -(-frame.entries // 2)
    check_lengths(payload, frame, scale_bytes + level_bytes)
    scales_g = _from_bytes(payload[:scale_bytes], torch.float32)
    levels_n = _from_bytes(payload[scale_bytes:], torch.int8)
    if largest == INT4:
        levels_n = _levels(levels_n, frame.entries)
    # The largest level times the scale must stay finite, so the scale is held to that.
    if not bool((torch.isfinite(scales_g * largest) & (scales_g >= 0)).all()):
        raise WireError("values", "a block scale is NaN, negative or too large")
    if levels_n.numel() and int(levels_n.min()) < -largest:
        raise WireError("values", f"a level is {-largest - 1}, which no sender writes")
    scales = torch.split(scales_g, counts)
    levels = torch.split(levels_n, [tensor.entries for tensor in frame.tensors])
    return [
        Blocks(level, scale, tensor.shape)
        for level, scale, tensor in zip(levels, scales, frame.tensors, strict=True)
    ]


def _nibbles(levels_n: Tensor) -> Tensor:
    """Levels in -7..7 as four bits each, the first in the lower half of a byte."""
    even = torch.nn.functional.pad(levels_n, (0, levels_n.numel() % 2)).view(torch.uint8)
    return (even[::2] & 15) | (even[1::2] << 4)


def _levels(packed: Tensor, entries: int) -> Tensor:
    """Levels [n] of ``_nibbles``; the half byte after an odd number of them must be zero."""
    # A left and an arithmetic right shift spread the sign of the lower half.
    both = torch.stack([(packed << 4) >> 4, packed >> 4], dim=1).reshape(-1)
    if both[entries:].any():
        raise WireError("payload", "bits are set after the last level")
    return both[:entries]


def check_lengths(payload: memoryview, frame: FrameInfo, expected_bytes: int) -> None:
    """Refuse a frame that is not compressed and has another length than its shapes give.

    Raises:
        WireError: It is so, or is announced as sparse.
    """
    if len(payload) != expected_bytes or frame.raw_bytes != expected_bytes:
        raise WireError(
            "counts",
            f"a frame of {frame.entries} entries has {len(payload)} bytes and claims "
            f"{frame.raw_bytes} raw, not {expected_bytes}",
        )
    if any(tensor.nonzeros is not None for tensor in frame.tensors):
        raise WireError("counts", "a dense frame announces non-zeros")


def _to_bytes(values: Tensor) -> bytes:
    # numpy knows no bfloat16: its bytes are taken as those of 16-bit integers.
    plain = values.contiguous().view(torch.int16) if values.dtype == torch.bfloat16 else values
    array: NDArray[Any] = plain.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_bytes(payload: memoryview, dtype: torch.dtype) -> Tensor:
    """Entries [n] of a payload, in memory of their own."""
    stored = {torch.float32: "<f4", torch.bfloat16: "<i2", torch.int8: "<i1"}[dtype]
    array = np.frombuffer(payload, stored)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).view(dtype)


def _plain(number: int, name: str, dtype: torch.dtype) -> Codec[Plain]:
    packing = Packing(number, _pack_plain, partial(_unpack_plain, dtype=dtype))
    return Codec(name, partial(_reduce_plain, dtype=dtype), (packing,))


def _blocks(number: int, name: str, largest: int) -> Codec[Blocks]:
    packing = Packing(
        number, partial(_pack_blocks, largest=largest), partial(_unpack_blocks, largest=largest)
    )
    return Codec(name, partial(_reduce_blocks, largest=largest), (packing,))


FP32 = _plain(pb.CODEC_FP32, "dense-fp32", torch.float32)
BF16 = _plain(pb.CODEC_BF16, "dense-bf16", torch.bfloat16)
EIGHT_BITS = _blocks(pb.CODEC_INT8, "dense-int8", INT8)
FOUR_BITS = _blocks(pb.CODEC_INT4, "dense-int4", INT4)
