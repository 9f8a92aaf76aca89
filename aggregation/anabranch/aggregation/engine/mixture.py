"""Mixtures of the contributions before the method, decided from one pass of inner products.

Shape legend: C contributions, K mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.gram import module_grams, total_gram
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.robust.pre import mixing


def mixture(
    cohort: Cohort,
    group: Group,
    budget_bytes: int,
    grams: Mapping[str, Tensor] | None = None,
) -> Tensor | None:
    """The steps before a group's method as one map [K, C], fp64; None where there are none.

    Args:
        cohort: The contributions, over the group's modules.
        group: What is merged alike: the inner products are over these modules.
        budget_bytes: Memory for dense entries.
        grams: ⟨τ_i, τ_j⟩ by module [C, C] where they are known.
    """
    if not group.pre or group.excluded:
        return None
    if grams is None:
        grams = module_grams(cohort, budget_bytes)
    mine = {module: grams[module] for module in group.modules}
    return mixing(group.pre, total_gram(mine, len(cohort)))
