"""A module's task vectors whole, formed one contribution at a time under a byte budget.

Shape legend: C contributions, K mixtures of them, m rows, n columns, D = m·n entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anabranch.aggregation.chunk import matrix_shape
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.rows import FP32_BYTES, fill_rows, merged_on
from anabranch.aggregation.whole import WHOLE_COPIES


class WholeModule:
    """A ``Whole`` that forms each contribution's tensor when it is its turn.

    Half the budget is for ranking one tensor, the other half for stretches of all of them.

    Args:
        cohort: The contributions.
        module: Which module.
        budget_bytes: Memory for entries.
        mix_KC: Gives these mixtures of the contributions instead; None gives them as they are.

    Raises:
        ValueError: The budget does not hold the tensor of one contribution.
    """

    def __init__(
        self, cohort: Cohort, module: str, budget_bytes: int, mix_KC: Tensor | None = None
    ) -> None:
        self._deltas = cohort.deltas[module]
        self._device = merged_on(cohort, module)
        self._shape = matrix_shape(self._deltas[0].shape)
        self._mix_KC = torch.eye(len(cohort), dtype=torch.float64) if mix_KC is None else mix_KC
        self.entries = self._shape[0] * self._shape[1]
        # A mixture is added up beside what is added to it.
        copies = WHOLE_COPIES + (mix_KC is not None)
        ranked_bytes = self.entries * FP32_BYTES * copies
        if ranked_bytes > budget_bytes // 2:
            raise ValueError(
                f"budget_bytes: {cohort.ranks.budget_line(budget_bytes)} cannot hold {module} of "
                "one contribution while its entries are ranked; allow at least "
                f"{2 * ranked_bytes * cohort.ranks.local_count}"
            )
        abreast_bytes = len(self) * FP32_BYTES
        self.side_by_side = max(1, min(self.entries, budget_bytes // 2 // abreast_bytes))
        self.size_bytes = ranked_bytes + self.side_by_side * abreast_bytes

    def __len__(self) -> int:
        """K."""
        return len(self._mix_KC)

    def __iter__(self) -> Iterator[Tensor]:
        """Entries [D] in fp32, of one mixture after the other, added up in one order."""
        for mix_C in self._mix_KC.tolist():
            total_mn: Tensor | None = None
            for delta, share in zip(self._deltas, mix_C, strict=True):
                if not share:
                    continue
                part_mn = torch.empty(self._shape, dtype=torch.float32, device=self._device)
                fill_rows(delta, 0, part_mn)
                part_mn = part_mn if share == 1 else part_mn.mul_(share)
                total_mn = part_mn if total_mn is None else total_mn.add_(part_mn)
            if total_mn is None:
                total_mn = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
            yield total_mn.view(-1)
