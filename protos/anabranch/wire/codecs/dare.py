"""A random share of the entries, enlarged by what was dropped (DARE, 2311.03099), at 8 bits.

Which entries are kept both ends draw from the manifest: the mask costs no bits. The code is
unbiased, and no contraction: it is for clients without error feedback.

Shape legend: n entries of a tensor, k kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.vectors.quantised import Blocks, quantise
from anabranch.wire.codecs.codec import Codec, Packed, Packing, SeedOf
from anabranch.wire.codecs.dense import EIGHT_BITS
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo, TensorInfo
from anabranch.wire.seeds import random_bytes
from anabranch.wire.v1 import update_pb2 as pb

_WHOLE = 1 << 32
"""A draw is below this."""


@dataclass(frozen=True, eq=False)
class Dropped:
    """A tensor whose entries a seed kept or dropped.

    Attributes:
        kept: The kept entries [k], in row order, before they are enlarged.
        threshold: An entry is kept where its draw of 0..2^32 - 1 is below it.
        seed: Of the draws.
        shape: Shape of the dense tensor.
    """

    kept: Blocks
    threshold: int
    seed: int
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.kept.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        entries_n = torch.zeros(self.shape.numel())
        mask_n = torch.from_numpy(_mask(self.seed, self.threshold, entries_n.numel()))
        entries_n[mask_n] = self.kept.dense() * (_WHOLE / self.threshold)
        return entries_n.reshape(self.shape)

    def norm(self) -> float:
        """‖·‖₂ in fp64."""
        return self.kept.norm() * (_WHOLE / self.threshold)


def _mask(seed: int, threshold: int, entries: int) -> NDArray[np.bool_]:
    draws_n = random_bytes(seed, 4 * entries).view("<u4")
    return draws_n < threshold


def _reduce(tensor: Tensor, config: CodecConfig, seed: int) -> Dropped:
    threshold = max(1, round(config.density * _WHOLE))
    entries_n = tensor.detach().to("cpu", torch.float32).reshape(-1)
    if not bool(torch.isfinite(entries_n).all()):
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    mask_n = torch.from_numpy(_mask(seed, threshold, entries_n.numel()))
    form = Dropped(quantise(entries_n[mask_n]), threshold, seed, tensor.shape)
    if not _enlarged_fits(form):
        raise ValueError(f"the tensor's entries over {config.density} are beyond fp32's range")
    return form


def _enlarged_fits(form: Dropped) -> bool:
    scales_g = form.kept.scales_g
    largest = 128 * float(scales_g.max()) if scales_g.numel() else 0.0
    return largest * (_WHOLE / form.threshold) < torch.finfo(torch.float32).max


def _pack(forms: Sequence[Dropped]) -> Packed:
    levels = EIGHT_BITS.packings[0].pack([form.kept for form in forms])
    assert levels is not None
    payload = (forms[0].threshold - 1).to_bytes(4, "little") + levels.payload
    return Packed(payload, len(payload))


def _unpack(payload: memoryview, frame: FrameInfo, seed_of: SeedOf) -> list[Dropped]:
    if len(payload) < 4:
        raise WireError("payload", f"{len(payload)} bytes hold no share of kept entries")
    threshold = int.from_bytes(payload[:4], "little") + 1
    seeds = [seed_of(tensor.name) for tensor in frame.tensors]
    kept = tuple(
        TensorInfo(tensor.name, (int(np.count_nonzero(_mask(seed, threshold, tensor.entries))),))
        for tensor, seed in zip(frame.tensors, seeds, strict=True)
    )
    if any(tensor.nonzeros is not None for tensor in frame.tensors):
        raise WireError("counts", "a dense frame announces non-zeros")
    inner = replace(frame, tensors=kept, raw_bytes=frame.raw_bytes - 4)
    blocks = cast(list[Blocks], EIGHT_BITS.packings[0].unpack(payload[4:], inner, seed_of))
    forms = [
        Dropped(block, threshold, seed, torch.Size(tensor.shape))
        for block, seed, tensor in zip(blocks, seeds, frame.tensors, strict=True)
    ]
    if not all(_enlarged_fits(form) for form in forms):
        raise WireError("values", "kept entries are beyond fp32's range once enlarged")
    return forms


DARE = Codec("dare", _reduce, (Packing(pb.CODEC_DARE, _pack, _unpack),))
