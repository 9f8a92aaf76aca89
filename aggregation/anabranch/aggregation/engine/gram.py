"""Inner products of task vectors, in fp64 and, for products of factors, without forming them.

Shape legend: C contributions, K = Σ k_i stacked inner ranks, D entries of a chunk,
L of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anabranch.aggregation.chunk import recut
from anabranch.aggregation.engine.cohort import Cohort, gather
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES, ModuleRows
from anabranch.aggregation.method import cosines, inner_products
from anabranch.vectors.task_vector import LowRank, TaskVector


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

    Modules held as factors cost O(K²(m + n)); dense ones are read once, a piece at a time.

    Args:
        cohort: The contributions.
        budget_bytes: Memory for dense entries.
    """
    grams = {}
    for module, deltas in cohort.deltas.items():
        factors = [delta for delta in deltas if isinstance(delta, LowRank)]
        if len(factors) == len(deltas):
            gram_CC = _factor_gram(factors).cpu()
        else:
            gram_CC = torch.zeros(len(cohort), len(cohort), dtype=torch.float64)
            rows = ModuleRows(cohort, module, budget_bytes)
            for piece_CL in recut(chunk.deltas_CD for chunk in rows):
                gram_CC += inner_products(piece_CL).cpu()
        grams[module] = gram_CC
    return cohort.ranks.union(grams)


def _factor_gram(factors: Sequence[LowRank]) -> Tensor:
    """⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀB_j) ∘ (A_iA_jᵀ), one contribution's strip [k_i, K] at a time."""
    device = factors[0].b_mk.device
    b_mK = torch.cat([part.b_mk for part in factors], dim=1).double()
    a_Kn = torch.cat([part.a_kn for part in factors], dim=0).double()
    ranks = torch.tensor([part.rank for part in factors], device=device)
    owner_K = torch.repeat_interleave(torch.arange(len(factors), device=device), ranks)
    gram_CC = torch.zeros(len(factors), len(factors), dtype=torch.float64, device=device)
    for row_C, part in zip(gram_CC, factors, strict=True):
        strip_kK = (part.b_mk.double().T @ b_mK) * (part.a_kn.double() @ a_Kn.T)
        row_C.index_add_(0, owner_K, strip_kK.sum(dim=0))
    return gram_CC


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
