"""What a method must know of its whole scope, and what it draws, before it can merge a chunk.

Shape legend: C contributions, D entries of a chunk, K rows of what is reduced (C of them, or 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from anabranch.aggregation.chunk import Chunk, Rows, recut
from anabranch.aggregation.kernels.rows import has_kernel, load
from anabranch.aggregation.magnitude import stream_kth, tensor_kth
from anabranch.aggregation.ranks import ALONE, Ranks

Found = Mapping[str, Tensor]
"""Statistics gathered so far, by name."""


class Chunks(Protocol):
    """The chunks of a scope: how many, and each of them as often as asked."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Chunk]: ...


@dataclass(frozen=True)
class Statistic:
    """One reduction over a method's scope, which is a tensor or the model.

    Attributes:
        name: The keyword under which ``merge`` gets it: a tensor [K] on the CPU.
        values: ``values(deltas_CD, weights_C, config, found) -> values_KD``: what is reduced, of
            one chunk in fp32. A pure function of each entry; ``found`` holds the statistics
            declared before this one.
        how: ``kth`` is the exact k-th largest and ``kth_magnitude`` the exact k-th largest
            magnitude, in fp32; ``sum`` is taken in fp64; ``min`` and ``max`` are what they say.
            None depends on how the entries are chunked.
        count: ``count(config, entries, found) -> k``, for the two that need one; ``entries`` is D
            of the whole scope.
        kernel: Where the values stand fused for large modules on the CPU, as ``module:function``
            of a chunk and what else ``values`` takes. For a ``sum``, their sums over parts of the
            chunk that do not depend on how the module was cut [K, P], fp64.
    """

    name: str
    values: Callable[[Tensor, Tensor, Any, Found], Tensor]
    how: Literal["kth", "kth_magnitude", "sum", "min", "max"]
    count: Callable[[Any, int, Found], int] | None = None
    kernel: str | None = None

    def __post_init__(self) -> None:
        if self.how.startswith("kth") != (self.count is not None):
            raise ValueError(
                f"statistic {self.name}: give a count to kth and kth_magnitude, and to no other"
            )


@dataclass(frozen=True)
class Draw:
    """Seeded random numbers for the entries of a chunk, the same however the entries are chunked.

    Attributes:
        name: The keyword under which ``merge`` gets them.
        make: ``make(chunk, config) -> drawn_CD``, from ``chunk.uniform``.
    """

    name: str
    make: Callable[[Chunk, Any], Tensor]


def entries_as_they_are(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    """Values of a statistic on the task vectors themselves [C, D]."""
    return deltas_CD


def magnitudes(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    """The same on their magnitudes [C, D]."""
    return deltas_CD.abs()


def gather_statistics(
    statistics: Sequence[Statistic],
    chunks: Chunks,
    entries: int,
    weights_C: Tensor,
    config: Any,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Statistics over a scope, in the order in which they are declared.

    Each costs one pass over the chunks, a k-th largest two; a lone chunk on the CPU costs it one.

    Args:
        statistics: What to gather.
        chunks: The whole scope, or what of it this rank has; iterated once or twice per statistic.
        entries: How many entries of a contribution these are together.
        weights_C: Checked weights [C].
        config: The method's parameters.
        ranks: Who has the rest.
    """
    found: dict[str, Tensor] = {}
    entries = sum(ranks.gather(entries))
    for statistic in statistics:
        stream = _Values(statistic, chunks, weights_C, config, found)
        if statistic.count is not None:
            count = statistic.count(config, entries, found)
            magnitude = statistic.how == "kth_magnitude"
            if len(chunks) == 1 and ranks.count == 1:
                (whole_KD,) = stream
                found[statistic.name] = tensor_kth(whole_KD, count, magnitude)
            else:
                found[statistic.name] = stream_kth(stream, count, magnitude, ranks)
        elif statistic.how == "sum":
            found[statistic.name] = ranks.reduce(stream.sums(), "sum")
        else:
            extreme: Literal["min", "max"] = "min" if statistic.how == "min" else "max"
            found[statistic.name] = ranks.reduce(_extreme(stream, extreme), extreme)
    return found


@dataclass(frozen=True)
class _Values:
    """What one statistic reduces, chunk by chunk, as often as asked."""

    statistic: Statistic
    chunks: Chunks
    weights_C: Tensor  # noqa: N815
    config: Any
    found: Found

    def __iter__(self) -> Iterator[Rows]:
        for chunk in self.chunks:
            yield self._of(chunk)

    def sums(self) -> Tensor | None:
        """Σ over the entries [K], in fp64; None of no chunks."""
        fused: list[Tensor] = []

        def others() -> Iterator[Tensor]:
            for chunk in self.chunks:
                values = self._of(chunk)
                assert isinstance(values, Tensor)
                if self._by_kernel(chunk):
                    fused.append(values)
                else:
                    yield values

        sums = [piece_KL.double().sum(dim=1).cpu() for piece_KL in recut(others())]
        if fused:
            sums.append(torch.cat(fused, dim=1).sum(dim=1))
        if not sums:
            return None
        total_K = torch.zeros_like(sums[0])
        for sum_K in sums:
            total_K += sum_K
        return total_K

    def _by_kernel(self, chunk: Chunk) -> bool:
        return chunk.fused and has_kernel(self.statistic.kernel, chunk.rows[0].device)

    def _of(self, chunk: Chunk) -> Rows:
        """The values of a chunk; a kernel's where it has one and they are large."""
        statistic = self.statistic
        if self._by_kernel(chunk):
            assert statistic.kernel is not None
            kernel = load(statistic.kernel, chunk.rows[0].device)
            values: Tensor = kernel(chunk, self.weights_C, self.config, self.found)
            return values
        if statistic.values is entries_as_they_are and statistic.count is not None:
            return chunk.rows
        return statistic.values(chunk.deltas_CD, self.weights_C, self.config, self.found)


def _extreme(stream: Iterable[Rows], how: Literal["min", "max"]) -> Tensor | None:
    """The largest or the smallest of the entries [K]; None of no chunks."""
    reduce = torch.amax if how == "max" else torch.amin
    found = []
    for values_KD in stream:
        assert isinstance(values_KD, Tensor)
        found.append(reduce(values_KD, dim=1).cpu())
    return reduce(torch.stack(found), dim=0) if found else None
