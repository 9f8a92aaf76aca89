"""The signs of a tensor's entries and the ranks of their magnitudes, for votes (FRL, USENIX 2023).

Whatever a sender's size, it has one permutation to say. Magnitudes do not travel: rank r is worth r
steps, one step a tensor, so that a form is a tensor like any other, for norms and error feedback.

Shape legend: n entries of a tensor, t tensors of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.wire.codecs import permutation, sparse
from anabranch.wire.codecs.codec import Codec, Packed, Packing, SeedOf
from anabranch.wire.codecs.dense import check_lengths
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.seeds import random_bytes
from anabranch.wire.v1 import update_pb2 as pb

_HEAD = np.dtype([("step", "<f4"), ("zeros", "<u4")])
"""What stands of each tensor before its permutation."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """A tensor as signs and ranks.

    Attributes:
        places_n: int64 [n], each of 0..n - 1 once: an entry's place by magnitude, 0 for the least.
        negative_n: bool [n], True where the entry is below 0.
        zeros: How many of the least are 0.
        step: What a rank, which is a place + 1, is worth; an fp32 value, 0 exactly when all are 0.
        shape: Shape of the dense tensor.
    """

    places_n: NDArray[np.int64]
    negative_n: NDArray[np.bool_]
    zeros: int
    step: float
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.places_n.nbytes + self.negative_n.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        entries_n = (self.places_n + 1).astype(np.float32) * np.float32(self.step)
        entries_n[self.places_n < self.zeros] = 0
        return torch.from_numpy(np.where(self.negative_n, -entries_n, entries_n)).view(self.shape)

    def norm(self) -> float:
        """‖·‖₂ in fp64."""
        return self.step * math.sqrt(_squares(self.places_n.size) - _squares(self.zeros))


def _squares(count: int) -> int:
    """1² + ... + count²."""
    return count * (count + 1) * (2 * count + 1) // 6


def _reduce(tensor: Tensor, config: CodecConfig, seed: int) -> Ranks:
    """Ranks, and the step of least squares.

    Equal magnitudes are ranked by chance: all entries are nearly equal after a first step of Adam,
    and places by position would then agree between clients.
    """
    entries_n = tensor.detach().to("cpu", torch.float32).reshape(-1).numpy()
    if not np.isfinite(entries_n).all():
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    count = entries_n.size
    if count >= 1 << 32:
        raise ValueError(f"the tensor has {count} entries; ranks are for fewer than 2^32")
    sizes_n = np.abs(entries_n)
    order_n = np.lexsort((random_bytes(seed, 8 * count).view("<u8"), sizes_n))
    places_n = np.empty(count, np.int64)
    places_n[order_n] = np.arange(count)
    zeros = int(np.count_nonzero(sizes_n == 0))
    ranks_k = np.arange(zeros + 1, count + 1, dtype=np.float64)
    step = float(ranks_k @ sizes_n[order_n[zeros:]].astype(np.float64))
    step /= max(1, _squares(count) - _squares(zeros))
    if not _fits(count, step):
        raise ValueError("the tensor's entries, as ranks of one step, are beyond fp32's range")
    # Subnormal entries may leave no step: nothing is said then.
    step = float(np.float32(step))
    return Ranks(places_n, entries_n < 0, zeros, step, tensor.shape) if step else _nothing(tensor)


def _nothing(tensor: Tensor) -> Ranks:
    count = tensor.numel()
    return Ranks(np.arange(count), np.zeros(count, np.bool_), count, 0.0, tensor.shape)


def _fits(count: int, step: float) -> bool:
    return count * step < 0.999 * torch.finfo(torch.float32).max


def _pack(forms: Sequence[Ranks]) -> Packed:
    head_t: NDArray[Any] = np.array([(form.step, form.zeros) for form in forms], _HEAD)
    parts = [head_t.tobytes()]
    for form in forms:
        parts += [permutation.pack(form.places_n), sparse.pack_bits(form.negative_n)]
    payload = b"".join(parts)
    return Packed(payload, len(payload))


def _unpack(payload: memoryview, frame: FrameInfo, seed_of: SeedOf) -> list[Ranks]:
    counts = [tensor.entries for tensor in frame.tensors]
    start = _HEAD.itemsize * len(counts)
    lengths = [(permutation.packed_bytes(n), sparse.bits_bytes(n)) for n in counts]
    check_lengths(payload, frame, start + sum(map(sum, lengths)))
    forms = []
    for tensor, (step, zeros), (places, signs) in zip(
        frame.tensors, np.frombuffer(payload[:start], _HEAD).tolist(), lengths, strict=True
    ):
        count = tensor.entries
        if not (math.isfinite(step) and step >= 0 and _fits(count, step)):
            raise WireError("values", f"a rank of {tensor.name} is worth {step}")
        if zeros > count or (step == 0) != (zeros == count):
            raise WireError("values", f"{tensor.name} has {zeros} zeros of {count} at step {step}")
        places_n = permutation.unpack(payload[start : start + places], count)
        start += places
        negative_n = sparse.unpack_bits(payload[start : start + signs], count)
        start += signs
        if negative_n[places_n < zeros].any():
            raise WireError("values", f"a zero of {tensor.name} has a sign")
        forms.append(Ranks(places_n, negative_n, zeros, step, torch.Size(tensor.shape)))
    return forms


RANKS = Codec("ranks", _reduce, (Packing(pb.CODEC_RANKS, _pack, _unpack),))
