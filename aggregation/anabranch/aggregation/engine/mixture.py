"""Mixtures of the contributions before the method, decided from one pass of inner products.

Shape legend: C contributions, K mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.gram import module_grams, total_gram
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.robust.pre import mixing


@dataclass(frozen=True)
class Mixture:
    """What a group's method sees in place of the contributions.

    Attributes:
        mix_KC: The steps before it as one map, fp64; None where there are none.
        gram_KK: Inner products over the group's modules of what it sees, fp64; None where it does
            not read them.
    """

    mix_KC: Tensor | None = None  # noqa: N815
    gram_KK: Tensor | None = None  # noqa: N815


def mixture(
    cohort: Cohort,
    group: Group,
    budget_bytes: int,
    grams: Mapping[str, Tensor] | None = None,
) -> Mixture:
    """The steps before a group's method, and the inner products that it reads itself.

    Args:
        cohort: The contributions, over the group's modules.
        group: What is merged alike: the inner products are over these modules.
        budget_bytes: Memory for dense entries.
        grams: ⟨τ_i, τ_j⟩ by module [C, C] where they are known.
    """
    if not group.needs_gram:
        return Mixture()
    if grams is None:
        grams = module_grams(cohort, budget_bytes)
    gram_CC = total_gram({module: grams[module] for module in group.modules}, len(cohort))
    mix_KC = mixing(group.pre, gram_CC) if group.pre else None
    if not group.method.needs_gram:
        return Mixture(mix_KC)
    return Mixture(mix_KC, gram_CC if mix_KC is None else mix_KC @ gram_CC @ mix_KC.T)
