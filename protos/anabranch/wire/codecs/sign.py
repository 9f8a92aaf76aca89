"""One bit an entry: its sign, and one scale per tensor (BitDelta, 2402.10193).

Shape legend: n entries of a tensor or a frame, t tensors of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anabranch.wire.codecs import sparse
from anabranch.wire.codecs.codec import Codec, Packed, Packing, SeedOf
from anabranch.wire.codecs.dense import check_lengths
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb


@dataclass(frozen=True, eq=False)
class Signs:
    """A tensor whose entries are +scale or -scale.

    Attributes:
        negative_n: bool [n], True where the entry is -scale.
        scale: An fp32 value.
        shape: Shape of the dense tensor.
    """

    negative_n: Tensor
    scale: float
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.negative_n.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        return torch.where(self.negative_n, -self.scale, self.scale).float().reshape(self.shape)

    def norm(self) -> float:
        """‖·‖₂ in fp64."""
        return self.scale * math.sqrt(self.negative_n.numel())


def _reduce(tensor: Tensor, config: CodecConfig, seed: int) -> Signs:
    """The mean magnitude is the least-squares scale."""
    entries_n = tensor.detach().to("cpu", torch.float32).reshape(-1)
    scale = float(entries_n.double().abs().mean()) if entries_n.numel() else 0.0
    if not math.isfinite(scale):
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    return Signs(entries_n < 0, float(np.float32(scale)), tensor.shape)


def _pack(forms: Sequence[Signs]) -> Packed:
    scales_t = np.array([form.scale for form in forms], "<f4").tobytes()
    payload = scales_t + sparse.pack_bits(
        np.concatenate([form.negative_n.numpy() for form in forms])
    )
    return Packed(payload, len(payload))


def _unpack(payload: memoryview, frame: FrameInfo, seed_of: SeedOf) -> list[Signs]:
    head = 4 * len(frame.tensors)
    check_lengths(payload, frame, head + sparse.bits_bytes(frame.entries))
    scales_t = np.frombuffer(payload[:head], "<f4").astype(float).tolist()
    if not all(math.isfinite(scale) and scale >= 0 for scale in scales_t):
        raise WireError("values", "a scale is NaN, infinite or negative")
    negative_n = torch.from_numpy(sparse.unpack_bits(payload[head:], frame.entries))
    parts = torch.split(negative_n, [tensor.entries for tensor in frame.tensors])
    return [
        Signs(part, scale, torch.Size(tensor.shape))
        for part, scale, tensor in zip(parts, scales_t, frame.tensors, strict=True)
    ]


SIGN = Codec("sign", _reduce, (Packing(pb.CODEC_SIGN, _pack, _unpack),))
