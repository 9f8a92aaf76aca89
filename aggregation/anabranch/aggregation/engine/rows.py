"""Dense rows of a module's task vectors, formed a chunk at a time under a byte budget.

Shape legend: C contributions, R rows of a chunk, n columns, D = R·n entries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from anabranch.aggregation.chunk import ROW_BLOCK as ROW_BLOCK
from anabranch.aggregation.chunk import Chunk, matrix_shape
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.kernels.rows import on_gpu, readable, worthwhile
from anabranch.vectors.sparse import SparseTernary
from anabranch.vectors.task_vector import Delta, LowRank, Streamed

DEFAULT_BUDGET_BYTES = 2 << 30

WORKING_COPIES = 6
"""What a chunk costs while it is merged, in copies of itself: the chunk, a masked copy, and the
values and 64-bit indices of a sort, or one copy in fp64."""

FP32_BYTES = 4

FUSED_CHUNK_BYTES = 32 << 20
"""A chunk for a kernel: what was just formed is then read from a cache, not from memory."""


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
        fused: Whether whoever reads the chunks has a kernel for them. Dense entries are then handed
            over where they lie, in one chunk, and cost no budget.
        in_place: Whether it reads entries where they lie. Whoever copies a chunk needs small ones.

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
        fused: bool = False,
        in_place: bool = True,
    ) -> None:
        self.module = module
        self._deltas = cohort.deltas[module]
        self._device = merged_on(cohort, module)
        self.rows, self.columns = matrix_shape(self._deltas[0].shape, whole_vectors)
        self._importances = cohort.importances.get(module, ())
        large = worthwhile(len(cohort), self.rows * self.columns, self._device)
        self.fused = fused and large and not self._importances
        self._kept: list[Chunk] | None = None
        if self.fused and in_place and all(self._lies_there(delta) for delta in self._deltas):
            self.step = self.rows
            where_they_lie = tuple(d.view(-1) for d in self._deltas if isinstance(d, Tensor))
            self._kept = [Chunk(module, 0, self.columns, where_they_lie, True)]
            return
        row_bytes = cohort.held_per_entry * max(1, self.columns) * FP32_BYTES
        # Entries need no product: where all are given, a row alone will do.
        products = any(isinstance(d, LowRank) for d in (*self._deltas, *self._importances))
        block = min(ROW_BLOCK if products else 1, max(1, self.rows))
        blocks = budget_bytes // 2 // (row_bytes * WORKING_COPIES * block)
        if not blocks:
            needed = 2 * row_bytes * WORKING_COPIES * block
            raise ValueError(
                f"budget_bytes: {cohort.ranks.budget_line(budget_bytes)} cannot hold {block} rows "
                f"of {module} for {len(cohort)} contributions; allow at least "
                f"{needed * cohort.ranks.local_count}"
            )
        if self.fused and not on_gpu(self._device):
            blocks = min(blocks, max(1, FUSED_CHUNK_BYTES // (row_bytes * block)))
        self.step = blocks * block
        result_bytes = self.rows * self.columns * FP32_BYTES
        self._keep = keep and self.rows * row_bytes + result_bytes <= budget_bytes // 2

    def __len__(self) -> int:
        """How many chunks there are."""
        return -(-self.rows // self.step)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks from the first row to the last."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        # Not a pass longer: sources of all modules live while a statistic runs over the model.
        memory: Tensor | None = None
        for start in range(0, self.rows, self.step):
            chunk = self._form(start, min(start + self.step, self.rows), memory)
            if self._keep:
                kept.append(chunk)
            elif self.fused:
                # A kernel never returns its inputs, so the next chunk may lie where this one does.
                # New memory costs as much as what is written to it.
                memory = chunk.deltas_CD
            yield chunk
        if self._keep:
            self._kept = kept

    def _lies_there(self, delta: Delta) -> bool:
        """Whether a kernel can read its entries where they lie."""
        return isinstance(delta, Tensor) and readable(delta) and delta.device == self._device

    def _form(self, start: int, stop: int, memory: Tensor | None) -> Chunk:
        shape = (len(self._deltas), stop - start, self.columns)
        if memory is not None and memory.numel() == math.prod(shape):
            rows_CRn = memory.view(shape)
        else:
            rows_CRn = torch.empty(shape, dtype=torch.float32, device=self._device)
        _fill(self._deltas, start, rows_CRn)
        importances_CD = None
        if self._importances:
            importances_CD = _fill(self._importances, start, torch.empty_like(rows_CRn)).flatten(1)
        return Chunk(
            self.module, start, self.columns, rows_CRn.flatten(1), self.fused, importances_CD
        )


def _fill(deltas: Sequence[Delta], start: int, out_CRn: Tensor) -> Tensor:
    """Write the rows of each change from ``start`` on into [C, R, n], and return them."""
    for delta, out_Rn in zip(deltas, out_CRn, strict=True):
        fill_rows(delta, start, out_Rn)
    return out_CRn


def fill_rows(delta: Delta, start: int, out_Rn: Tensor) -> None:
    """Write the rows of a change from ``start`` on, a multiple of ``ROW_BLOCK``, into [R, n].

    They may lie on another device than the change.
    """
    if isinstance(delta, Streamed):
        if out_Rn.device.type == "cpu":
            delta.read(start * out_Rn.shape[1], out_Rn.view(-1))
            return
        # Pinned, so that the device fetches them itself.
        read_Rn = torch.empty(out_Rn.shape, pin_memory=True)
        delta.read(start * out_Rn.shape[1], read_Rn.view(-1))
        out_Rn.copy_(read_Rn)
        return
    if not isinstance(delta, LowRank):
        rows_mn = delta.reshape(-1, out_Rn.shape[1])
        out_Rn.copy_(rows_mn[start : start + len(out_Rn)])
        return
    b_Rk = delta.b_mk[start : start + len(out_Rn)].to(out_Rn)
    a_kn = delta.a_kn.to(out_Rn)
    for first in range(0, len(out_Rn), ROW_BLOCK):
        block = slice(first, first + ROW_BLOCK)
        torch.mm(b_Rk[block], a_kn, out=out_Rn[block])


def device_of(delta: Delta) -> torch.device:
    """Where a change lives, or is read to."""
    if isinstance(delta, Streamed):
        return torch.device("cpu")
    return delta.b_mk.device if isinstance(delta, LowRank) else delta.device


def merged_on(cohort: Cohort, module: str) -> torch.device:
    """Where a module's chunks are merged."""
    return cohort.device or device_of(cohort.deltas[module][0])


def large_ternary(deltas: Sequence[Delta], device: torch.device) -> list[SparseTernary]:
    """One module's changes where all are sparse ternary and kernels take them, else none.

    Args:
        deltas: One change per contribution.
        device: Where they are merged.
    """
    sparse = [delta for delta in deltas if isinstance(delta, SparseTernary)]
    if len(sparse) < len(deltas) or not sparse:
        return []
    size = worthwhile(len(sparse), sparse[0].entries, device)
    return sparse if size else []
