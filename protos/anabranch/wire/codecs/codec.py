"""What a codec is: one lossy step per tensor, one lossless step per frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from anabranch.wire.config import CodecConfig
from anabranch.wire.manifest import FrameInfo


class Form(Protocol):
    """A tensor as a codec sees it; for instance ``SparseTernary``."""

    def dense(self) -> Tensor:
        """The tensor itself, in fp32."""
        ...


F = TypeVar("F", bound=Form)


@dataclass(frozen=True)
class Packed:
    """A frame's payload and what its manifest row must say to unpack it.

    Attributes:
        payload: The bytes that travel.
        raw_bytes: Their length before compression.
        nonzeros: Per tensor; empty where the codec is not sparse.
        scales: Per tensor, fp32 values; empty where the codec is not sparse.
    """

    payload: bytes
    raw_bytes: int
    nonzeros: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class Codec(Generic[F]):
    """A way to encode tensors.

    All loss is in ``reduce``: ``unpack`` of ``pack`` gives equal forms back, bit for bit, so a
    sender knows what its receiver will decode without decoding.

    Attributes:
        number: The codec's number in update.proto, never used again for another.
        name: For people and logs; it stands in the manifest.
        reduce: Tensor of any shape to form. Raises ValueError on NaN and infinite entries.
        pack: Forms of a frame's tensors, in order, to payload.
        unpack: Payload and its row of the manifest, whose shapes are already known to be the
            local ones, to forms. It trusts nothing else, and raises WireError.
    """

    number: int
    name: str
    reduce: Callable[[Tensor, CodecConfig], F]
    pack: Callable[[Sequence[F]], Packed]
    unpack: Callable[[memoryview, FrameInfo], list[F]]
