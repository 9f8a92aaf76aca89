"""Sparse tensors whose kept entries have two bits: a sign, and which of two magnitudes.

Where few are kept they differ much in size, and a bit for that buys more than the entry it costs
(SparseLoCo, 2508.15706, sends 1-3% of the entries at two bits).

Shape legend: k kept entries of a tensor or a frame, t tensors of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from anabranch.vectors.select import keep
from anabranch.wire.codecs import sparse
from anabranch.wire.codecs.codec import Codec, Packed, Packing, SeedOf
from anabranch.wire.codecs.sparse import Array
from anabranch.wire.codecs.support import DRAWS, MASK, RUNS, Support
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb


@dataclass(frozen=True, eq=False)
class TwoBit:
    """A tensor whose entries are 0, ±scale or ±large.

    Attributes:
        positions_k: int64 [k], strictly ascending, into the flattened tensor.
        negative_k: bool [k], True where the entry is below 0.
        large_k: bool [k], True where its magnitude is ``large``.
        scale: The smaller magnitude, an fp32 value; 0 exactly when k is 0.
        large: The larger one, an fp32 value.
        shape: Shape of the dense tensor.
    """

    positions_k: Tensor
    negative_k: Tensor
    large_k: Tensor
    scale: float
    large: float
    shape: torch.Size

    @property
    def entries(self) -> int:
        """All entries of the dense tensor."""
        return self.shape.numel()

    @property
    def nonzeros(self) -> int:
        """Entries that are not 0."""
        return self.positions_k.numel()

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.positions_k.nbytes + 2 * self.negative_k.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        values_k = torch.where(self.large_k, self.large, self.scale).float()
        entries_n = np.zeros(self.entries, np.float32)
        entries_n[self.positions_k.numpy()] = torch.where(self.negative_k, -values_k, values_k)
        return torch.from_numpy(entries_n).reshape(self.shape)

    def norm(self) -> float:
        """‖·‖₂ in fp64, from the counts of both magnitudes."""
        large = int(self.large_k.sum())
        root = math.sqrt
        return math.hypot(self.scale * root(self.nonzeros - large), self.large * root(large))


def _reduce(tensor: Tensor, config: CodecConfig, seed: int) -> TwoBit:
    positions_k, values_k = keep(tensor, config.density)
    scale, large, large_k = _two_magnitudes(np.abs(values_k))
    return TwoBit(
        torch.from_numpy(positions_k),
        torch.from_numpy(values_k < 0),
        torch.from_numpy(large_k),
        scale,
        large,
        tensor.shape,
    )


def _two_magnitudes(magnitudes_k: Array) -> tuple[float, float, Array]:
    """The two values nearest to all magnitudes in the square, and which of them have the larger.

    Exact: a best partition on a line is a cut of the sorted values, and prefix sums price them all.
    """
    if not magnitudes_k.size:
        return 0.0, 0.0, np.zeros(0, np.bool_)
    sorted_k = np.sort(magnitudes_k).astype(np.float64)
    below_k = np.cumsum(sorted_k)
    counts_k = np.arange(1, sorted_k.size + 1)
    above_k, rest_k = below_k[-1] - below_k, sorted_k.size - counts_k
    # The error is ‖x‖² less this; the last cut puts all into one class.
    explained_k = below_k**2 / counts_k + above_k**2 / np.maximum(rest_k, 1)
    cut = int(np.argmax(explained_k))
    large_k = magnitudes_k > sorted_k[cut]
    count = int(np.count_nonzero(large_k))
    scale = float(np.float32(sorted_k[: sorted_k.size - count].mean()))
    large = float(np.float32(sorted_k[sorted_k.size - count :].mean())) if count else scale
    return scale, large, large_k


def _pack(forms: Sequence[TwoBit], support: Support) -> Packed | None:
    larges_t = np.array([form.large for form in forms], "<f4").tobytes()
    negative_k = np.concatenate([form.negative_k.numpy() for form in forms])
    large_k = np.concatenate([form.large_k.numpy() for form in forms])
    bits = sparse.pack_bits(negative_k) + sparse.pack_bits(large_k)
    return sparse.pack(support, forms, larges_t + bits)


def _unpack(
    payload: memoryview, frame: FrameInfo, seed_of: SeedOf, support: Support
) -> list[TwoBit]:
    rows = sparse.read_rows(frame)
    head, bits = 4 * len(frame.tensors), sparse.bits_bytes(rows.total)
    positions, rest = sparse.unpack(support, payload, frame, rows, head + 2 * bits)
    larges_t = np.frombuffer(rest[:head], "<f4").astype(float).tolist()
    negative_k = torch.from_numpy(sparse.unpack_bits(rest[head : head + bits], rows.total))
    large_k = torch.from_numpy(sparse.unpack_bits(rest[head + bits :], rows.total))
    forms = []
    for row, tensor in enumerate(frame.tensors):
        large, scale, kept = larges_t[row], rows.scales[row], rows.slices[row]
        if not (math.isfinite(large) and large >= scale and (scale > 0 or large == 0)):
            raise WireError("values", f"{tensor.name} has magnitudes {scale} and {large}")
        found = torch.from_numpy(positions[row])
        shape = torch.Size(tensor.shape)
        forms.append(TwoBit(found, negative_k[kept], large_k[kept], scale, large, shape))
    return forms


def _packing(number: int, support: Support) -> Packing[TwoBit]:
    return Packing(number, partial(_pack, support=support), partial(_unpack, support=support))


TWO_BIT = Codec(
    name="two-bit",
    reduce=_reduce,
    packings=(
        _packing(pb.CODEC_TWO_BIT, RUNS),
        _packing(pb.CODEC_TWO_BIT_MASK, MASK),
        _packing(pb.CODEC_TWO_BIT_DRAWS, DRAWS),
    ),
)
