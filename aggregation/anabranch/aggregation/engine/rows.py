"""Dense rows of a module's task vectors, formed a chunk at a time under a byte budget.

Shape legend: C contributions, R rows of a chunk, n columns, D = R·n entries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anabranch.aggregation.chunk import Chunk, matrix_shape
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.vectors.task_vector import Delta, LowRank, Stored

DEFAULT_BUDGET_BYTES = 2 << 30

ROW_BLOCK = 32
"""Products are formed in blocks of this many rows, whatever the chunk: a BLAS result depends on the
shape of the call, and a merge must not depend on the budget."""

WORKING_COPIES = 6
"""What a chunk costs while it is merged, in copies of itself: the chunk, a masked copy, and the
values and 64-bit indices of a sort, or one copy in fp64."""

FP32_BYTES = 4


class ModuleRows:
    """One module's task vectors as chunks of rows; iterating again forms them again.

    Half the budget is for a chunk with what merging it takes, the other half for what is kept
    between passes. Chunks are kept where all of them, and the module they merge to, fit that half.

    Args:
        cohort: The contributions.
        module: Which module.
        budget_bytes: Memory for entries.
        keep: Whether a second pass will come.
        whole_vectors: Whether a vector is one row, or may be cut.

    Raises:
        ValueError: The budget holds no block of rows.
    """

    def __init__(
        self,
        cohort: Cohort,
        module: str,
        budget_bytes: int,
        keep: bool = False,
        whole_vectors: bool = False,
    ) -> None:
        self.module = module
        self._deltas = cohort.deltas[module]
        self.rows, self.columns = matrix_shape(self._deltas[0].shape, whole_vectors)
        row_bytes = len(cohort) * max(1, self.columns) * FP32_BYTES
        # Entries need no product: where all are given, a row alone will do.
        products = any(isinstance(delta, LowRank) for delta in self._deltas)
        block = min(ROW_BLOCK if products else 1, max(1, self.rows))
        blocks = budget_bytes // 2 // (row_bytes * WORKING_COPIES * block)
        if not blocks:
            raise ValueError(
                f"budget_bytes: {budget_bytes} cannot hold {block} rows of {module} for "
                f"{len(cohort)} contributions; allow at least "
                f"{2 * row_bytes * WORKING_COPIES * block}"
            )
        self.step = blocks * block
        result_bytes = self.rows * self.columns * FP32_BYTES
        self._keep = keep and self.rows * row_bytes + result_bytes <= budget_bytes // 2
        self._kept: list[Chunk] | None = None

    def __len__(self) -> int:
        """How many chunks there are."""
        return -(-self.rows // self.step)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks from the first row to the last."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for start in range(0, self.rows, self.step):
            chunk = self._form(start, min(start + self.step, self.rows))
            if self._keep:
                kept.append(chunk)
            yield chunk
        if self._keep:
            self._kept = kept

    def _form(self, start: int, stop: int) -> Chunk:
        device = device_of(self._deltas[0])
        rows_CRn = torch.empty(
            (len(self._deltas), stop - start, self.columns), dtype=torch.float32, device=device
        )
        for delta, out_Rn in zip(self._deltas, rows_CRn, strict=True):
            fill_rows(delta, start, out_Rn)
        return Chunk(self.module, start, self.columns, rows_CRn.flatten(1))


def fill_rows(delta: Delta, start: int, out_Rn: Tensor) -> None:
    """Write the rows of a change from ``start`` on, a multiple of ``ROW_BLOCK``, into [R, n]."""
    if isinstance(delta, Stored):
        delta.read(start * out_Rn.shape[1], out_Rn.view(-1))
        return
    if not isinstance(delta, LowRank):
        rows_mn = delta.reshape(-1, out_Rn.shape[1])
        out_Rn.copy_(rows_mn[start : start + len(out_Rn)])
        return
    b_Rk = delta.b_mk[start : start + len(out_Rn)].float()
    a_kn = delta.a_kn.float()
    for first in range(0, len(out_Rn), ROW_BLOCK):
        block = slice(first, first + ROW_BLOCK)
        torch.mm(b_Rk[block], a_kn, out=out_Rn[block])


def device_of(delta: Delta) -> torch.device:
    """Where a change lives, or is read to."""
    if isinstance(delta, Stored):
        return torch.device("cpu")
    return delta.b_mk.device if isinstance(delta, LowRank) else delta.device
