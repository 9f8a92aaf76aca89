"""Sparse ternary tensors: the largest entries as signs times one scale, near the entropy limit.

The limit is H(d) + d bits per entry at density d (Shannon, 1948): the support costs H(d), and signs
are coin flips, which follow as packed bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor

from anabranch.vectors.sparse import SparseTernary, ternarise
from anabranch.wire.codecs import sparse, ternary_runs
from anabranch.wire.codecs.codec import Codec, Packed, Packing
from anabranch.wire.codecs.support import DRAWS, MASK, RUNS, Support
from anabranch.wire.config import CodecConfig
from anabranch.wire.v1 import update_pb2 as pb


def _reduce(tensor: Tensor, config: CodecConfig, seed: int) -> SparseTernary:
    return ternarise(tensor, config.density)


def _pack(forms: Sequence[SparseTernary], support: Support) -> Packed | None:
    negative_k = np.concatenate([form.negative_k.numpy() for form in forms])
    return sparse.pack(support, forms, sparse.pack_bits(negative_k))


def _packing(number: int, support: Support) -> Packing[SparseTernary]:
    pack, unpack = partial(_pack, support=support), partial(ternary_runs.unpack, support=support)
    return Packing(number, pack, unpack)


TERNARY = Codec(
    name="ternary",
    reduce=_reduce,
    packings=(
        _packing(pb.CODEC_TERNARY, RUNS),
        _packing(pb.CODEC_TERNARY_MASK, MASK),
        _packing(pb.CODEC_TERNARY_DRAWS, DRAWS),
    ),
)
