"""One to eight bits an entry after a random rotation (EDEN, 2108.08842 and ICML 2022).

A random rotation makes the entries of any block close to normal, so one table of levels, the best
for a normal law (Lloyd 1982, Max 1960), fits all of them; codes that occur more often are written
shorter. The rotation is a Hadamard transform of randomly flipped entries. Both ends draw the flips
from the manifest, so they cost nothing.

EDEN scales what it sends to be unbiased. Here the scale is the one of least squares: error feedback
asks for a contraction, and an unbiased code is none at one bit.

Shape legend: n entries of a tensor, g blocks of it, s entries of a block, a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.wire import zstd
from anabranch.wire.codecs.codec import Codec, Packed, Packing, SeedOf
from anabranch.wire.codecs.dense import check_not_sparse
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.seeds import random_bytes
from anabranch.wire.v1 import update_pb2 as pb

Floats = NDArray[np.float32]

_LARGEST_BLOCK = 1 << 12
"""So that a block's transform stays in the L1 cache; larger ones are hardly nearer to normal."""

_POSITIVE = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560052, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423404, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
"""Levels above zero of the Lloyd-Max quantisers of a standard normal law, by bits."""

_STEP = {5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Steps of the best even quantisers of it (Max 1960, table II), which lose less once coded."""


@dataclass(frozen=True, eq=False)
class Rotated:
    """A tensor as levels of its rotated blocks.

    Attributes:
        codes_n: uint8 [n], in 0..2^bits - 1: levels in ascending order.
        scales_g: fp32 [g]: what a level of 1 is worth in each block.
        bits: Of a code.
        seed: The flips are drawn from it.
        shape: Shape of the dense tensor.
    """

    codes_n: NDArray[np.uint8]
    scales_g: Floats
    bits: int
    seed: int
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.codes_n.nbytes + self.scales_g.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        entries_n = levels_of(self.bits)[self.codes_n]
        for block, scale in zip(blocks_of(self.codes_n.size), self.scales_g, strict=True):
            entries_n[block] = _transform(entries_n[block]) * scale
        return torch.from_numpy(entries_n * flips(self.seed, entries_n.size)).reshape(self.shape)

    def norm(self) -> float:
        """‖·‖₂ in fp64: a rotation keeps it."""
        squares_n = levels_of(self.bits).astype(float)[self.codes_n] ** 2
        return math.sqrt(
            sum(
                float(squares_n[block].sum()) * float(scale) ** 2
                for block, scale in zip(blocks_of(self.codes_n.size), self.scales_g, strict=True)
            )
        )


def blocks_of(entries: int) -> Iterator[slice]:
    """Blocks of a tensor: as many of the largest size as fit, then powers of two to its end."""
    full, rest = divmod(entries, _LARGEST_BLOCK)
    sizes = [_LARGEST_BLOCK] * full
    sizes += [1 << bit for bit in reversed(range(_LARGEST_BLOCK.bit_length())) if rest >> bit & 1]
    return (slice(first, last) for first, last in pairwise(accumulate(sizes, initial=0)))


@lru_cache(maxsize=4)
def levels_of(bits: int) -> Floats:
    """All levels of a code, ascending, fp32 [2^bits]."""
    even = (np.arange(1 << (bits - 1)) + 0.5) * _STEP.get(bits, 0)
    positive = np.array(_POSITIVE.get(bits, even), np.float32)
    return np.concatenate([-positive[::-1], positive])


def flips(seed: int, entries: int) -> Floats:
    """Signs [n] of a tensor, each +1 or -1 with equal chance."""
    bits_n = np.unpackbits(random_bytes(seed, -(-entries // 8)), count=entries, bitorder="little")
    return 1 - 2 * bits_n.astype(np.float32)


def _transform(entries_s: Floats) -> Floats:
    """The orthonormal Hadamard transform, its own inverse.

    By additions in a fixed order: the same bits on every machine.
    """
    size = entries_s.size
    half = 1
    while half < size:
        pairs = entries_s.reshape(-1, 2, half)
        left, right = pairs[:, 0], pairs[:, 1]
        entries_s = np.stack([left + right, left - right], axis=1).reshape(-1)
        half *= 2
    return entries_s * np.float32(1 / math.sqrt(size))


def _reduce(tensor: Tensor, config: CodecConfig, seed: int, bits: int) -> Rotated:
    entries_n = tensor.detach().to("cpu", torch.float32).reshape(-1).numpy()
    if not np.isfinite(entries_n).all():
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    levels = levels_of(bits)
    between = (levels[1:] + levels[:-1]) / 2
    flipped_n = entries_n * flips(seed, entries_n.size)
    codes, scales = [np.zeros(0, np.uint8)], []
    for block in blocks_of(entries_n.size):
        rotated_s = _transform(flipped_n[block])
        sigma = float(np.sqrt(np.square(rotated_s, dtype=np.float64).mean()))
        codes_s = np.searchsorted(between, rotated_s / np.float32(sigma or 1)).astype(np.uint8)
        chosen_s = levels[codes_s].astype(np.float64)
        # Least squares: <rotated, levels> / <levels, levels>.
        scales.append(float(rotated_s.astype(np.float64) @ chosen_s / (chosen_s @ chosen_s)))
        codes.append(codes_s)
    scales_g = np.array(scales, np.float32)
    if not np.isfinite(scales_g).all():
        raise ValueError("the tensor holds entries beyond the range of a rotated code")
    return Rotated(np.concatenate(codes), scales_g, bits, seed, tensor.shape)


def _shifts(bits: int) -> NDArray[np.uint8]:
    """Where in a byte each of its codes begins: a byte holds as many as fit whole."""
    return np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)


def _pack(forms: Sequence[Rotated], bits: int) -> Packed:
    scales = b"".join(form.scales_g.astype("<f4").tobytes() for form in forms)
    codes_n = np.concatenate([form.codes_n for form in forms])
    each = 8 // bits
    whole = np.pad(codes_n, (0, -codes_n.size % each)).reshape(-1, each)
    packed = np.bitwise_or.reduce(whole << _shifts(bits), axis=1)
    coded = zstd.compress_symbols(packed.data) if packed.size else b""
    return Packed(scales + coded, len(scales) + packed.size)


def _unpack(payload: memoryview, frame: FrameInfo, seed_of: SeedOf, bits: int) -> list[Rotated]:
    counts = [len(list(blocks_of(tensor.entries))) for tensor in frame.tensors]
    head, size = 4 * sum(counts), -(-frame.entries // (8 // bits))
    check_not_sparse(frame)
    if frame.raw_bytes != head + size or len(payload) < head or (size == 0 and len(payload) > head):
        raise WireError(
            "counts",
            f"a frame of {frame.entries} entries has {len(payload)} bytes and claims "
            f"{frame.raw_bytes} raw, not {head + size}",
        )
    scales_g = np.frombuffer(payload[:head], "<f4").astype(np.float32)
    # A block's largest entry is at most its norm: no more than √s levels of the largest size.
    most = np.finfo(np.float32).max / (_LARGEST_BLOCK * levels_of(bits)[-1])
    if not bool(((scales_g >= 0) & (scales_g < most)).all()):
        raise WireError("values", "a block scale is NaN, negative or too large")
    raw = zstd.decompress(payload[head:], size, size, "payload") if size else b""
    packed = np.frombuffer(raw, np.uint8)
    spread = packed[:, None] >> _shifts(bits)
    if bits * (8 // bits) < 8 and (packed >> np.uint8(bits * (8 // bits))).any():
        raise WireError("payload", "bits are set beside the codes")
    codes_n = (spread & np.uint8((1 << bits) - 1)).reshape(-1)
    if codes_n[frame.entries :].any():
        raise WireError("payload", "bits are set after the last code")
    codes_n = codes_n[: frame.entries]
    codes = np.split(codes_n, list(accumulate(tensor.entries for tensor in frame.tensors))[:-1])
    scales = np.split(scales_g, list(accumulate(counts))[:-1])
    return [
        Rotated(code, scale, bits, seed_of(tensor.name), torch.Size(tensor.shape))
        for code, scale, tensor in zip(codes, scales, frame.tensors, strict=True)
    ]


def _rotated(number: int, bits: int) -> Codec[Rotated]:
    packing = Packing(number, partial(_pack, bits=bits), partial(_unpack, bits=bits))
    return Codec(f"rotated-{bits}", partial(_reduce, bits=bits), (packing,))


ROTATED = tuple(_rotated(pb.CODEC_ROTATED_1 + bits - 1, bits) for bits in range(1, 9))
