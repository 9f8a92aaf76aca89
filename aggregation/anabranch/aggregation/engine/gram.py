"""Inner products of task vectors, in fp64 and, for products of factors, without forming them.

Shape legend: C contributions, K = Σ k_i stacked inner ranks, or non-zeros of sparse ones laid end
to end, s of a strip, n entries, D entries of a chunk, L of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from anabranch.aggregation.chunk import recut
from anabranch.aggregation.engine.cohort import Cohort, gather
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES, ModuleRows, merged_on
from anabranch.aggregation.finite import check_finite
from anabranch.aggregation.kernels.rows import GRAM, has_kernel, load
from anabranch.aggregation.method import cosines, inner_products
from anabranch.vectors.sparse import SparseTernary
from anabranch.vectors.task_vector import LowRank, TaskVector

_STRIP = 256
"""Stacked ranks multiplied with all others at once: thin products waste most of the processor."""


def gram(cohort: Cohort, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> Tensor:
    """⟨τ_i, τ_j⟩ over all modules [C, C]; see ``module_grams``."""
    return total_gram(module_grams(cohort, budget_bytes), len(cohort))


def total_gram(grams: Mapping[str, Tensor], count: int) -> Tensor:
    """⟨τ_i, τ_j⟩ over all modules [C, C], symmetric, from those of each."""
    total_CC = torch.zeros(count, count, dtype=torch.float64)
    for gram_CC in grams.values():
        total_CC += gram_CC
    return (total_CC + total_CC.T) / 2


def module_grams(cohort: Cohort, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> dict[str, Tensor]:
    """⟨τ_i, τ_j⟩ by module [C, C], fp64, on the CPU, symmetric up to rounding; those of all ranks.

    Modules held as factors cost O(K²(m + n)), sparse ternary ones O(C·K); dense ones are read once,
    a piece at a time.

    Args:
        cohort: The contributions.
        budget_bytes: Memory for dense entries.

    Raises:
        ValueError: A number that is not finite; names the contribution.
    """
    # One tensor: one for each module, made between large ones, would fray the heap.
    count = len(cohort)
    all_MCC = torch.zeros(len(cohort.deltas), count, count, dtype=torch.float64)
    grams = dict(zip(cohort.deltas, all_MCC, strict=True))
    for module, deltas in cohort.deltas.items():
        factors = [delta for delta in deltas if isinstance(delta, LowRank)]
        sparse = [delta for delta in deltas if isinstance(delta, SparseTernary)]
        if len(factors) == len(deltas):
            grams[module] += _factor_gram(factors).cpu()
        elif len(sparse) == len(deltas):
            grams[module] += _ternary_gram(sparse)
        else:
            for gram_CC in _dense_grams(cohort, module, budget_bytes):
                grams[module] += gram_CC
        _check_finite(cohort, module, grams[module])
    return cohort.ranks.union(grams)


def _dense_grams(cohort: Cohort, module: str, budget_bytes: int) -> Iterator[Tensor]:
    """Those of the pieces of a module, one after the other; large ones where they lie."""
    device = merged_on(cohort, module)
    by_kernel = has_kernel(GRAM, device)
    rows = ModuleRows(cohort, module, budget_bytes, fused=by_kernel)
    if not (by_kernel and rows.fused):
        for piece_CL in recut(chunk.deltas_CD for chunk in rows):
            yield inner_products(piece_CL).cpu()
        return
    piece_grams = load(GRAM, device)
    if len(rows) == 1:
        (chunk,) = rows
        yield from piece_grams(chunk.rows)
        return
    for pieces_CL in recut((chunk.deltas_CD for chunk in rows), several=True):
        yield from piece_grams(pieces_CL)


def _check_finite(cohort: Cohort, module: str, gram_CC: Tensor) -> None:
    """Refuse numbers that are not finite: no square of one that is leaves the range of fp64.

    Raises:
        ValueError: There are some; names the contribution.
    """
    if not bool(gram_CC.diagonal().isfinite().all()):
        for name, delta in zip(cohort.names, cohort.deltas[module], strict=True):
            check_finite(delta, f"{name}: module {module}")


def _factor_gram(factors: Sequence[LowRank]) -> Tensor:
    """⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀB_j) ∘ (A_iA_jᵀ), a strip [s, K] of it at a time."""
    device = factors[0].b_mk.device
    b_mK = torch.cat([part.b_mk for part in factors], dim=1).double()
    a_Kn = torch.cat([part.a_kn for part in factors], dim=0).double()
    ranks = torch.tensor([part.rank for part in factors], device=device)
    owner_K = torch.repeat_interleave(torch.arange(len(factors), device=device), ranks)
    gram_CC = torch.zeros(len(factors), len(factors), dtype=torch.float64, device=device)
    for start in range(0, len(owner_K), _STRIP):
        strip = slice(start, start + _STRIP)
        strip_sK = (b_mK[:, strip].T @ b_mK) * (a_Kn[strip] @ a_Kn.T)
        strip_sC = torch.zeros(len(strip_sK), len(factors), dtype=torch.float64, device=device)
        gram_CC.index_add_(0, owner_K[strip], strip_sC.index_add_(1, owner_K, strip_sK))
    return gram_CC


def _ternary_gram(updates: Sequence[SparseTernary]) -> Tensor:
    """s_i·s_j·(non-zeros of i and j that agree − those that do not): counted, so nothing rounds."""
    counts_CC = np.zeros((len(updates), len(updates)), np.int64)
    used = [c for c, update in enumerate(updates) if update.nonzeros]
    ends = list(accumulate((updates[c].nonzeros for c in used), initial=0))
    positions_K = np.concatenate([update.positions_k.numpy() for update in updates])
    negative_K = np.concatenate([update.negative_k.numpy() for update in updates])
    signs_K = np.where(negative_K, np.int8(-1), np.int8(1))
    mine_n = np.zeros(updates[0].entries, np.int8)
    for row, (start, stop) in enumerate(pairwise(ends)):
        mine_n[positions_K[start:stop]] = signs_K[start:stop]
        # Those before were counted from their side.
        agrees_K = mine_n[positions_K[start:]] * signs_K[start:]
        counts = np.add.reduceat(agrees_K, np.array(ends[row:-1]) - start, dtype=np.int64)
        counts_CC[used[row], used[row:]] = counts_CC[used[row:], used[row]] = counts
        mine_n[positions_K[start:stop]] = 0
    scales_C = torch.tensor([update.scale for update in updates], dtype=torch.float64)
    return torch.from_numpy(counts_CC) * scales_C[:, None] * scales_C[None, :]


def cosine_similarity(
    vectors: Sequence[TaskVector], budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> Tensor:
    """How alike task vectors are, pair by pair [C, C], fp64.

    Args:
        vectors: One task vector per contribution.
        budget_bytes: Memory for dense entries.

    Raises:
        ValueError: The task vectors cannot be compared; see ``gather``.
    """
    return cosines(gram(gather(vectors), budget_bytes))
