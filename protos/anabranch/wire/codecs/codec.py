"""What a codec is: one lossy step per tensor, one lossless step per frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from anabranch.wire.config import CodecConfig
from anabranch.wire.manifest import FrameInfo


class Form(Protocol):
    """A tensor as a codec sees it; for instance ``SparseTernary``."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        ...

    def dense(self) -> Tensor:
        """The tensor itself, in fp32."""
        ...

    def norm(self) -> float:
        """Its ‖·‖₂ in fp64, without making it dense where that is possible."""
        ...


F = TypeVar("F", bound=Form)

SeedOf = Callable[[str], int]


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
class Packing(Generic[F]):
    """A lossless way to write a frame's forms.

    What ``unpack`` makes of what ``pack`` wrote has the same entries, bit for bit; it may be of
    another class, which takes less.

    Attributes:
        number: Its number in update.proto, never used again for another.
        pack: Forms of a frame's tensors, in order, to payload; None where another one of the codec
            is sure to be smaller, or to be faster by more than it is larger.
        unpack: Payload, its row of the manifest, whose shapes are already known to be the local
            ones, and what gives a tensor's seed by its name, to forms. It trusts nothing else,
            and raises WireError.
    """

    number: int
    pack: Callable[[Sequence[F]], Packed | None]
    unpack: Callable[[memoryview, FrameInfo, SeedOf], Sequence[Form]]


@dataclass(frozen=True)
class Codec(Generic[F]):
    """A way to encode tensors.

    All loss is in ``reduce``, so a sender knows what its receiver will decode without decoding.

    Attributes:
        name: For people and logs; it stands in the manifest.
        reduce: Tensor of any shape, the configuration and the tensor's seed (``seeds.seed_of``) to
            form. Raises ValueError on NaN and infinite entries.
        packings: How a frame of forms can be written; each frame takes the smallest.
        level: Tensors by name and the configuration to a configuration of each tensor's own, where
            what is best for one depends on the others; None where it does not.
    """

    name: str
    reduce: Callable[[Tensor, CodecConfig, int], F]
    packings: tuple[Packing[F], ...]
    level: Callable[[Mapping[str, Tensor], CodecConfig], Mapping[str, CodecConfig]] | None = None

    def pack(self, forms: Sequence[F]) -> tuple[int, Packed]:
        """The smallest way to write these forms, and its number; of equal ones the first."""
        written = [(packing.number, packing.pack(forms)) for packing in self.packings]
        found = [(number, packed) for number, packed in written if packed is not None]
        return min(found, key=lambda one: len(one[1].payload))
