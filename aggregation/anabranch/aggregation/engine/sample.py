"""Some entries of every contribution, for methods that look at a sample.

Shape legend: C contributions, K mixtures of them, m rows, n columns, k inner rank, S entries of a
sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.rows import ModuleRows
from anabranch.aggregation.sample import positions
from anabranch.vectors.task_vector import LowRank


def sampled(cohort: Cohort, count: int, config: Any, budget_bytes: int) -> Tensor:
    """The drawn entries of all modules [C, S], fp32, on the CPU, in the order of the modules.

    Of products of factors only these entries are formed; dense modules are read once.

    Args:
        cohort: The contributions, over the modules of this rank.
        count: How many entries to draw of all modules together.
        config: What draws them.
        budget_bytes: Memory for dense entries.
    """
    sizes = cohort.ranks.union(
        {module: parts[0].shape.numel() for module, parts in cohort.deltas.items()}
    )
    drawn = positions(sizes, count, config)
    mine = {module: _of(cohort, module, drawn[module], budget_bytes) for module in cohort.deltas}
    return torch.cat(list(cohort.ranks.union(mine).values()), dim=1)


def _of(cohort: Cohort, module: str, positions_S: Tensor, budget_bytes: int) -> Tensor:
    deltas = cohort.deltas[module]
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas):
        columns = deltas[0].shape[1]
        where_S = positions_S.to(factors[0].b_mk.device)
        rows_S, columns_S = where_S // columns, where_S % columns
        return torch.stack(
            [(one.b_mk[rows_S] * one.a_kn[:, columns_S].T).sum(dim=1).cpu() for one in factors]
        )
    found = []
    for chunk in ModuleRows(cohort, module, budget_bytes, fused=True):
        first = chunk.start * chunk.columns
        here_S = positions_S[(positions_S >= first) & (positions_S < first + len(chunk.rows[0]))]
        where_S = (here_S - first).to(chunk.rows[0].device)
        # A chunk's memory may hold the next one: indexing copies.
        found.append(torch.stack([row_D[where_S].cpu() for row_D in chunk.rows]))
    return torch.cat(found, dim=1)
