"""Frames of sparse tensors, laid end to end: a support, then what is said of each non-zero.

Shape legend: k non-zeros of a tensor or a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anabranch.wire.codecs.codec import Packed
from anabranch.wire.codecs.support import RUNS, Support
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo

Array = NDArray[Any]


class Sparse(Protocol):
    """A sparse tensor; for instance ``SparseTernary``."""

    @property
    def positions_k(self) -> Tensor:
        """int64 [k], strictly ascending, into the flattened tensor."""
        ...

    @property
    def scale(self) -> float:
        """What its manifest row says; 0 exactly when k is 0."""
        ...

    @property
    def entries(self) -> int:
        """All entries of the dense tensor."""
        ...

    @property
    def nonzeros(self) -> int:
        """Entries that are not 0."""
        ...


@dataclass(frozen=True)
class Rows:
    """What a frame's row of the manifest says of its tensors, checked.

    Attributes:
        nonzeros: Per tensor.
        scales: Per tensor: finite, 0 exactly where there is no non-zero.
    """

    nonzeros: tuple[int, ...]
    scales: tuple[float, ...]

    @cached_property
    def total(self) -> int:
        """Non-zeros of the frame."""
        return sum(self.nonzeros)

    @property
    def slices(self) -> list[slice]:
        """Which of the frame's non-zeros are each tensor's."""
        cuts = [0, *accumulate(self.nonzeros)]
        return [slice(first, last) for first, last in pairwise(cuts)]


def pack(support: Support, forms: Sequence[Sparse], rest: bytes) -> Packed | None:
    """A frame of forms: their support and the ``rest``, which is not compressed."""
    starts = [0, *accumulate(form.entries for form in forms)]
    places = [form.positions_k.numpy() for form in forms]
    positions_k = places[0]
    if len(places) > 1:
        moved = [place + start for place, start in zip(places, starts, strict=False)]
        positions_k = np.concatenate(moved)
    written: tuple[bytes, int] | None = (b"", 0)
    if positions_k.size:
        written = support.pack(positions_k, starts[-1])
    elif support is not RUNS:
        written = None
    if written is None:
        return None
    return Packed(
        payload=written[0] + rest,
        raw_bytes=written[1] + len(rest),
        nonzeros=tuple(form.nonzeros for form in forms),
        scales=tuple(form.scale for form in forms),
    )


def unpack(
    support: Support, payload: memoryview, frame: FrameInfo, rows: Rows, rest_bytes: int
) -> tuple[list[Array], memoryview]:
    """Positions [k] of each tensor, and the rest."""
    total = rows.total
    packed, rest = split(support, payload, frame, rows, rest_bytes)
    if total == 0:
        return [np.zeros(0, np.int64) for _ in rows.nonzeros], rest
    positions_k = support.unpack(packed, frame.raw_bytes - rest_bytes, total, frame.entries)
    starts = [0, *accumulate(tensor.entries for tensor in frame.tensors)]
    if np.searchsorted(positions_k, starts).tolist() != [0, *accumulate(rows.nonzeros)]:
        raise WireError("counts", "non-zeros lie in other tensors than announced")
    found = [positions_k[kept] for kept in rows.slices]
    for positions, start in zip(found[1:], starts[1:], strict=False):
        positions -= start
    return found, rest


def split(
    support: Support, payload: memoryview, frame: FrameInfo, rows: Rows, rest_bytes: int
) -> tuple[memoryview, memoryview]:
    """The support's bytes and the rest; where there are no non-zeros, no bytes are the support."""
    total = rows.total
    if total > frame.entries:
        raise WireError("counts", f"{total} non-zeros cannot lie in {frame.entries} entries")
    if len(payload) < rest_bytes:
        raise WireError("payload", f"{len(payload)} bytes cannot hold {total} non-zeros")
    cut = len(payload) - rest_bytes
    if not total and (cut or frame.raw_bytes != rest_bytes or support is not RUNS):
        raise WireError("payload", f"{cut} bytes are left where nothing is kept")
    return payload[:cut], payload[cut:]


def read_rows(frame: FrameInfo) -> Rows:
    """Non-zeros and scales per tensor; that the support places so many in each is seen later."""
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
    return Rows(tuple(nonzeros), tuple(scales))


def bits_bytes(count: int) -> int:
    """Bytes that hold so many bits."""
    return -(-count // 8)


def pack_bits(bits_k: Array) -> bytes:
    """Booleans [k] as bits, the first one lowest."""
    return np.packbits(bits_k, bitorder="little").tobytes()


def unpack_bits(packed: memoryview, count: int) -> Array:
    """Booleans [k] of ``pack_bits``; bits after the last one must be zero."""
    check_last_bits(packed, count)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count, bitorder="little")
    return bits.view(np.bool_)


def check_last_bits(packed: memoryview, count: int) -> None:
    """Refuse bits after the last one of ``pack_bits``, in ``bits_bytes`` bytes."""
    if count % 8 and packed[-1] >> count % 8:
        raise WireError("payload", "bits are set after the last sign")
