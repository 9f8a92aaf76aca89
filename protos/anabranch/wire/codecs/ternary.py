"""Sparse ternary tensors as zero runs and signs, within 1-2% of the entropy limit.

A frame's tensors are laid end to end, and each non-zero is written as the run of zeros before it,
one byte a run ("gap8"): 0..254 is a run and its non-zero, 255 is an escape, 255 zeros and no
non-zero yet. Runs are independent draws of a geometric law, so Huffman codes alone compress them.
Signs are coin flips, and follow as packed bits. There is one encoding of each frame, and only
that one is accepted.

The limit is H(d) + d bits per entry at density d (reference: Shannon 1948; Golomb 1966 for runs).

Shape legend: k non-zeros of a tensor or a frame, r run bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.vectors.sparse import SparseTernary, nothing, ternarise
from anabranch.wire import zstd
from anabranch.wire.codecs.codec import Codec, Packed
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb

Array = NDArray[Any]

_ESCAPE = 255


def _reduce(tensor: Tensor, config: CodecConfig) -> SparseTernary:
    return ternarise(tensor, config.density)


def _pack(forms: Sequence[SparseTernary]) -> Packed:
    starts = [0, *accumulate(form.entries for form in forms)]
    positions_k = np.concatenate(
        [form.positions_k.numpy() + start for form, start in zip(forms, starts, strict=False)]
    )
    negative_k = np.concatenate([form.negative_k.numpy() for form in forms])
    runs_r = _runs(positions_k)
    signs = np.packbits(negative_k, bitorder="little").tobytes()
    return Packed(
        payload=(zstd.compress_symbols(runs_r.data) if runs_r.size else b"") + signs,
        raw_bytes=runs_r.size + len(signs),
        nonzeros=tuple(form.nonzeros for form in forms),
        scales=tuple(form.scale for form in forms),
    )


def _runs(positions_k: Array) -> Array:
    """Run bytes [r] of ascending positions [k]."""
    gaps_k = np.diff(positions_k, prepend=-1) - 1
    if gaps_k.size == 0 or gaps_k.max() < _ESCAPE:
        return gaps_k.astype(np.uint8)
    escapes_k = gaps_k // _ESCAPE
    runs_r = np.full(gaps_k.size + int(escapes_k.sum()), _ESCAPE, np.uint8)
    runs_r[np.arange(gaps_k.size) + np.cumsum(escapes_k)] = gaps_k % _ESCAPE
    return runs_r


def _positions(runs_r: Array) -> Array:
    """Positions [k] of run bytes [r]: each byte stands for so many entries, the non-zero too."""
    ending_r = runs_r != _ESCAPE
    ends_r = np.cumsum(runs_r + ending_r.view(np.uint8), dtype=np.int64)
    ends_r -= 1
    return ends_r if ending_r.all() else ends_r[ending_r]


def _unpack(payload: memoryview, frame: FrameInfo) -> list[SparseTernary]:
    nonzeros, scales = _rows(frame)
    total = sum(nonzeros)
    sign_bytes = -(-total // 8)
    run_bytes = frame.raw_bytes - sign_bytes
    # Each non-zero has its byte; the zeros can fill so many escapes and no more.
    if not total <= run_bytes <= total + (frame.entries - total) // _ESCAPE:
        raise WireError(
            "counts", f"{run_bytes} run bytes cannot place {total} among {frame.entries} entries"
        )
    if len(payload) < sign_bytes or (total == 0 and len(payload) > 0):
        raise WireError("payload", f"{len(payload)} bytes cannot hold {total} signs")
    if total == 0:
        return [nothing(torch.Size(tensor.shape)) for tensor in frame.tensors]
    packed_runs = payload[: len(payload) - sign_bytes]
    runs_r = np.frombuffer(zstd.decompress(packed_runs, run_bytes, run_bytes, "payload"), np.uint8)
    positions_k = _positions(runs_r)
    if positions_k.size != total or runs_r[-1] == _ESCAPE:
        raise WireError("counts", f"the runs end {positions_k.size} non-zeros, not {total}")
    if positions_k[-1] >= frame.entries:
        raise WireError(
            "counts", f"position {positions_k[-1]} is beyond the frame's {frame.entries} entries"
        )
    bits = np.unpackbits(
        np.frombuffer(payload[len(payload) - sign_bytes :], np.uint8), bitorder="little"
    )
    if bits[total:].any():
        raise WireError("payload", "bits are set after the last sign")
    negative_k = bits[:total].view(np.bool_)
    return _split(frame, positions_k, negative_k, nonzeros, scales)


def _rows(frame: FrameInfo) -> tuple[list[int], list[float]]:
    """Non-zeros and scales per tensor; that the runs place so many in each is seen later."""
    nonzeros, scales = [], []
    for tensor in frame.tensors:
        if tensor.nonzeros is None or tensor.scale is None:
            raise WireError("counts", f"no non-zeros are announced for {tensor.name}")
        if not (math.isfinite(tensor.scale) and tensor.scale >= 0):
            raise WireError("values", f"the scale of {tensor.name} is {tensor.scale}")
        if (tensor.scale == 0) != (tensor.nonzeros == 0):
            raise WireError(
                "values",
                f"{tensor.name} has {tensor.nonzeros} non-zeros of scale {tensor.scale}",
            )
        nonzeros.append(tensor.nonzeros)
        scales.append(tensor.scale)
    return nonzeros, scales


def _split(
    frame: FrameInfo,
    positions_k: Array,
    negative_k: Array,
    nonzeros: Sequence[int],
    scales: Sequence[float],
) -> list[SparseTernary]:
    """Cut a frame's positions and signs at the tensors' ends, which must agree with the counts."""
    starts = [0, *accumulate(tensor.entries for tensor in frame.tensors)]
    cuts = [0, *accumulate(nonzeros)]
    if np.searchsorted(positions_k, starts).tolist() != cuts:
        raise WireError("counts", "non-zeros lie in other tensors than announced")
    forms = []
    for row, tensor in enumerate(frame.tensors):
        kept = slice(cuts[row], cuts[row + 1])
        positions = positions_k[kept]
        positions -= starts[row]
        forms.append(
            SparseTernary(
                torch.from_numpy(positions),
                torch.from_numpy(negative_k[kept]),
                scales[row],
                torch.Size(tensor.shape),
            )
        )
    return forms


TERNARY = Codec(number=pb.CODEC_TERNARY, name="ternary", reduce=_reduce, pack=_pack, unpack=_unpack)
