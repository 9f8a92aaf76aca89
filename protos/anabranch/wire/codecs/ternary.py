"""Sparse ternary tensors: the largest entries as signs times one scale, near the entropy limit.

The limit is H(d) + d bits per entry at density d (Shannon, 1948): the support costs H(d), and signs
are coin flips, which follow as packed bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from anabranch.vectors.sparse import SparseTernary, ternarise
from anabranch.wire.codecs import sparse
from anabranch.wire.codecs.codec import Codec, Packed, Packing, SeedOf
from anabranch.wire.codecs.support import DRAWS, MASK, RUNS, Support
from anabranch.wire.config import CodecConfig
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb


def _reduce(tensor: Tensor, config: CodecConfig, seed: int) -> SparseTernary:
    return ternarise(tensor, config.density)


def _pack(forms: Sequence[SparseTernary], support: Support) -> Packed | None:
    negative_k = np.concatenate([form.negative_k.numpy() for form in forms])
    return sparse.pack(support, forms, sparse.pack_bits(negative_k))


def _unpack(
    payload: memoryview, frame: FrameInfo, seed_of: SeedOf, support: Support
) -> list[SparseTernary]:
    rows = sparse.read_rows(frame)
    sign_bytes = sparse.bits_bytes(rows.total)
    positions, signs = sparse.unpack(support, payload, frame, rows, sign_bytes)
    negative_k = torch.from_numpy(sparse.unpack_bits(signs, rows.total))
    return [
        SparseTernary(torch.from_numpy(found), negative_k[kept], scale, torch.Size(tensor.shape))
        for found, kept, scale, tensor in zip(
            positions, rows.slices, rows.scales, frame.tensors, strict=True
        )
    ]


def _packing(number: int, support: Support) -> Packing[SparseTernary]:
    return Packing(number, partial(_pack, support=support), partial(_unpack, support=support))


TERNARY = Codec(
    name="ternary",
    reduce=_reduce,
    packings=(
        _packing(pb.CODEC_TERNARY, RUNS),
        _packing(pb.CODEC_TERNARY_MASK, MASK),
        _packing(pb.CODEC_TERNARY_DRAWS, DRAWS),
    ),
)
