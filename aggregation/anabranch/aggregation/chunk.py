"""A piece of a module with every contribution's entries: what methods are handed.

Shape legend: C contributions, R rows of a chunk, n columns, D = R·n entries of a chunk, L entries
of a piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.vectors.counter import uniform

PIECE = 1 << 16
"""Entries added up, or drawn, at once. Rounding depends on what is added to what, and a merge must
not depend on the budget, so pieces are the same wherever chunks were cut."""

ROW_BLOCK = 32
"""Rows of a matrix that no chunk cuts. Products are formed so many at a time, whatever the chunk: a
BLAS result depends on the shape of the call, and a merge must not depend on the budget."""

Rows = Tensor | Sequence[Tensor]
"""Each contribution's entries: one tensor [C, D], or C of them [D] where they lie."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one module, of every contribution.

    Attributes:
        module: Its name, which names the seeded draws.
        start: Index of the first row.
        columns: n.
        rows: Entries in row order [C, R·n], fp32. Belongs to whoever iterates: not to be written
            to.
        fused: Whether kernels take the module, which its whole size decides.
        importances_CD: How much each entry matters to its contribution [C, R·n], fp32, zero or
            more; for methods that need it.
    """

    module: str
    start: int
    columns: int
    rows: Rows
    fused: bool = False
    importances_CD: Tensor | None = None  # noqa: N815

    @property
    def deltas_CD(self) -> Tensor:  # noqa: N802
        """The entries as one tensor [C, R·n]; a copy where they are not."""
        return self.rows if isinstance(self.rows, Tensor) else torch.stack(list(self.rows))

    def uniform(self, seed: int, contribution: int, first: int, count: int) -> Tensor:
        """Uniform numbers in [0, 1), fp64, for ``count`` entries of the chunk from ``first`` on.

        They belong to the place in the module: the same however it is cut into chunks.
        """
        stream = (seed, self.module, contribution)
        position = self.start * self.columns + first
        return uniform(count, stream, position, self.rows[0].device)


def matrix_shape(shape: torch.Size, whole_vectors: bool = False) -> tuple[int, int]:
    """Rows and columns a tensor is chunked by: a vector may be cut anywhere, or is one row."""
    if len(shape) < 2:
        return (1, shape.numel()) if whole_vectors else (shape.numel(), 1)
    return shape[0], shape[1:].numel()


def recut(stream_KD: Iterable[Tensor], several: bool = False) -> Iterator[Tensor]:
    """The same entries [K, L] in pieces of ``PIECE``, the last one shorter.

    Each lies where the stream's entries do or where the piece before it did: use it before asking
    for the next.

    Args:
        stream_KD: The entries in order.
        several: Pieces that follow each other in the stream's memory may come as one.
    """
    # Made once: memory of this size given back and asked for again frays the heap.
    cut_KL: Tensor | None = None
    filled = 0
    for values_KD in stream_KD:
        done = 0
        while (left := values_KD.shape[1] - done) > 0:
            if not filled and left >= PIECE:
                taken = left // PIECE * PIECE if several else PIECE
                yield values_KD[:, done : done + taken]
                done += taken
                continue
            if cut_KL is None:
                cut_KL = values_KD.new_empty(len(values_KD), PIECE)
            taken = min(left, PIECE - filled)
            cut_KL[:, filled : filled + taken] = values_KD[:, done : done + taken]
            done, filled = done + taken, filled + taken
            if filled == PIECE:
                yield cut_KL
                filled = 0
    if cut_KL is not None and filled:
        yield cut_KL[:, :filled]
