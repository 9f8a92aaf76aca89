"""Every entry, at 32, 16, 8 or 4 bits.

A payload is the values as they are, or, where that is smaller, the first bytes of all of them, then
the second ones, and so on, Huffman-coded: signs and exponents lie close together, mantissas do not.

Shape legend: n entries of a tensor or a frame, g blocks of a quantised form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.vectors.quantised import INT4, INT8, Blocks, blocks_of, quantise
from anabranch.wire import zstd
from anabranch.wire.codecs.codec import Codec, F, Packed, Packing, SeedOf
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb

_LEAST_CODED = 1 << 13
"""Bytes of a frame from which coding is tried: below, its table costs what it saves."""


@dataclass(frozen=True, eq=False)
class Plain:
    """A tensor as its values.

    Attributes:
        values: fp32, bf16 or fp16, of the tensor's shape.
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


def _raw_plain(forms: Sequence[Plain]) -> bytes:
    return b"".join(_to_bytes(form.values) for form in forms)


def _read_plain(raw: memoryview, frame: FrameInfo, dtype: torch.dtype) -> list[Plain]:
    values_n = _from_bytes(raw, dtype)
    if not _all_finite(values_n):
        raise WireError("values", "a frame holds NaN or infinite values")
    parts = torch.split(values_n, [tensor.entries for tensor in frame.tensors])
    return [
        Plain(part.reshape(tensor.shape)) for part, tensor in zip(parts, frame.tensors, strict=True)
    ]


def _reduce_blocks(tensor: Tensor, config: CodecConfig, seed: int, largest: int) -> Blocks:
    return quantise(tensor, largest)


def _raw_blocks(forms: Sequence[Blocks], largest: int) -> bytes:
    scales = b"".join(_to_bytes(form.scales_g) for form in forms)
    levels_n = torch.cat([form.levels_n for form in forms])
    return scales + _to_bytes(levels_n if largest == INT8 else _nibbles(levels_n))


def _block_bytes(frame: FrameInfo, largest: int) -> int:
    levels = frame.entries if largest == INT8 else -(-frame.entries // 2)
    return 4 * sum(blocks_of(tensor.entries) for tensor in frame.tensors) + levels


def _read_blocks(raw: memoryview, frame: FrameInfo, largest: int) -> list[Blocks]:
    counts = [blocks_of(tensor.entries) for tensor in frame.tensors]
    scales_g = _from_bytes(raw[: 4 * sum(counts)], torch.float32)
    levels_n = _from_bytes(raw[4 * sum(counts) :], torch.int8)
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
    check_not_sparse(frame)


def check_not_sparse(frame: FrameInfo) -> None:
    """Refuse a dense frame that is announced as sparse.

    Raises:
        WireError: It is so.
    """
    if any(tensor.nonzeros is not None for tensor in frame.tensors):
        raise WireError("counts", "a dense frame announces non-zeros")


def _to_bytes(values: Tensor) -> bytes:
    # numpy knows no bfloat16: the bytes of halves are taken as those of 16-bit integers.
    half = values.dtype in (torch.bfloat16, torch.float16)
    plain = values.contiguous().view(torch.int16) if half else values
    array: NDArray[Any] = plain.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_bytes(payload: memoryview, dtype: torch.dtype) -> Tensor:
    """Entries [n] of a payload, in memory of their own."""
    array = np.frombuffer(payload, {4: "<f4", 2: "<i2", 1: "<i1"}[dtype.itemsize])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).view(dtype)


def _packings(
    numbers: tuple[int, int],
    raw_of: Callable[[Sequence[F]], bytes],
    raw_bytes: Callable[[FrameInfo], int],
    read: Callable[[memoryview, FrameInfo], list[F]],
    width: int,
) -> tuple[Packing[F], Packing[F]]:
    """Values as they are, and Huffman-coded by planes of bytes.

    Args:
        numbers: Of both.
        raw_of: Forms of a frame to bytes.
        raw_bytes: How many those are.
        read: And back.
        width: Bytes of an entry, which lie in a plane each.
    """

    def pack(forms: Sequence[F]) -> Packed:
        raw = raw_of(forms)
        return Packed(raw, len(raw))

    def unpack(payload: memoryview, frame: FrameInfo, seed_of: SeedOf) -> list[F]:
        check_lengths(payload, frame, raw_bytes(frame))
        return read(payload, frame)

    def pack_coded(forms: Sequence[F]) -> Packed | None:
        raw = np.frombuffer(raw_of(forms), np.uint8)
        if raw.size < _LEAST_CODED:
            return None
        planes = np.ascontiguousarray(raw.reshape(-1, width).T)
        return Packed(zstd.compress_symbols(planes.data), raw.size)

    def unpack_coded(payload: memoryview, frame: FrameInfo, seed_of: SeedOf) -> list[F]:
        check_not_sparse(frame)
        expected = raw_bytes(frame)
        if frame.raw_bytes != expected:
            raise WireError("counts", f"a frame claims {frame.raw_bytes} raw bytes, not {expected}")
        planes = np.frombuffer(zstd.decompress(payload, expected, expected, "payload"), np.uint8)
        raw = np.empty((planes.size // width, width), np.uint8)
        # Plane by plane: a transposed copy goes entry by entry, and takes seven times as long.
        for place, plane in enumerate(planes.reshape(width, -1)):
            raw[:, place] = plane
        return read(raw.reshape(-1).data, frame)

    return (Packing(numbers[0], pack, unpack), Packing(numbers[1], pack_coded, unpack_coded))


def _plain(numbers: tuple[int, int], name: str, dtype: torch.dtype) -> Codec[Plain]:
    packings = _packings(
        numbers,
        _raw_plain,
        lambda frame: frame.entries * dtype.itemsize,
        partial(_read_plain, dtype=dtype),
        dtype.itemsize,
    )
    return Codec(name, partial(_reduce_plain, dtype=dtype), packings)


def _blocks(numbers: tuple[int, int], name: str, largest: int) -> Codec[Blocks]:
    packings = _packings(
        numbers,
        partial(_raw_blocks, largest=largest),
        partial(_block_bytes, largest=largest),
        partial(_read_blocks, largest=largest),
        1,
    )
    return Codec(name, partial(_reduce_blocks, largest=largest), packings)


FP32 = _plain((pb.CODEC_FP32, pb.CODEC_FP32_CODED), "dense-fp32", torch.float32)
BF16 = _plain((pb.CODEC_BF16, pb.CODEC_BF16_CODED), "dense-bf16", torch.bfloat16)
FP16 = _plain((pb.CODEC_FP16, pb.CODEC_FP16_CODED), "dense-fp16", torch.float16)
EIGHT_BITS = _blocks((pb.CODEC_INT8, pb.CODEC_INT8_CODED), "dense-int8", INT8)
FOUR_BITS = _blocks((pb.CODEC_INT4, pb.CODEC_INT4_CODED), "dense-int4", INT4)
