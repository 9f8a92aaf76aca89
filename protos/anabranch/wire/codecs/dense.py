"""Every entry, at 32, 16 or 8 bits. Payloads are the values as they are: nothing to blow up.

Shape legend: n entries of a tensor or a frame, g blocks of the int8 form.
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

from anabranch.vectors.quantised import Int8Blocks, blocks_of, quantise
from anabranch.wire.codecs.codec import Codec, Packed
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb

_INT8_RANGE = 127


@dataclass(frozen=True, eq=False)
class Plain:
    """A tensor as its values.

    Attributes:
        values: fp32 or bf16, of the tensor's shape.
    """

    values: Tensor

    def dense(self) -> Tensor:
        """The tensor itself, in fp32."""
        return self.values.float()


def _reduce_plain(tensor: Tensor, config: CodecConfig, dtype: torch.dtype) -> Plain:
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


def _unpack_plain(payload: memoryview, frame: FrameInfo, dtype: torch.dtype) -> list[Plain]:
    _check_lengths(payload, frame, frame.entries * dtype.itemsize)
    values_n = _from_bytes(payload, dtype)
    if not _all_finite(values_n):
        raise WireError("values", "a frame holds NaN or infinite values")
    parts = torch.split(values_n, [tensor.entries for tensor in frame.tensors])
    return [
        Plain(part.reshape(tensor.shape)) for part, tensor in zip(parts, frame.tensors, strict=True)
    ]


def _reduce_int8(tensor: Tensor, config: CodecConfig) -> Int8Blocks:
    return quantise(tensor)


def _pack_int8(forms: Sequence[Int8Blocks]) -> Packed:
    scales = b"".join(_to_bytes(form.scales_g) for form in forms)
    payload = scales + b"".join(_to_bytes(form.levels_n) for form in forms)
    return Packed(payload, len(payload))


def _unpack_int8(payload: memoryview, frame: FrameInfo) -> list[Int8Blocks]:
    blocks = [blocks_of(tensor.entries) for tensor in frame.tensors]
    scale_bytes = 4 * sum(blocks)
    _check_lengths(payload, frame, scale_bytes + frame.entries)
    scales_g = _from_bytes(payload[:scale_bytes], torch.float32)
    levels_n = _from_bytes(payload[scale_bytes:], torch.int8)
    # The largest level times the scale must stay finite, so the scale is held to that.
    if not bool((torch.isfinite(scales_g * _INT8_RANGE) & (scales_g >= 0)).all()):
        raise WireError("values", "a block scale is NaN, negative or too large")
    if bool((levels_n < -_INT8_RANGE).any()):
        raise WireError("values", "a level is -128, which no sender writes")
    scales = torch.split(scales_g, blocks)
    levels = torch.split(levels_n, [tensor.entries for tensor in frame.tensors])
    return [
        Int8Blocks(level, scale, tensor.shape)
        for level, scale, tensor in zip(levels, scales, frame.tensors, strict=True)
    ]


def _check_lengths(payload: memoryview, frame: FrameInfo, expected_bytes: int) -> None:
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
    return Codec(
        number=number,
        name=name,
        reduce=partial(_reduce_plain, dtype=dtype),
        pack=_pack_plain,
        unpack=partial(_unpack_plain, dtype=dtype),
    )


FP32 = _plain(pb.CODEC_FP32, "dense-fp32", torch.float32)
BF16 = _plain(pb.CODEC_BF16, "dense-bf16", torch.bfloat16)
INT8 = Codec(
    number=pb.CODEC_INT8,
    name="dense-int8",
    reduce=_reduce_int8,
    pack=_pack_int8,
    unpack=_unpack_int8,
)
