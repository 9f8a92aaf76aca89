"""Iso-C: isotropic merging in the common subspace (Marczak et al., 2502.04959).

Shape legend: C contributions, m rows, n columns, p and q rows and columns of a core, r directions.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.core_space import Directions, core_space, directions
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.vectors.task_vector import Held


class IsoCConfig(MethodConfig):
    """Parameters of Iso-C. λ is the recipe's ``scale``, on a *sum* of task vectors."""

    rank: int | None = Field(None, ge=1)
    """Directions of the sum kept, the largest; None keeps all. Going back to rank r afterwards can
    only pick among equals, so give r here, or keep all by ``refactor.kind = "stack"``."""


def iso_c(deltas: Sequence[Held], weights_C: Tensor, config: IsoCConfig) -> Held:
    """mean(s)·U·V for Σ w_i τ_i = U·diag(s)·V: every direction of the sum gets the same say.

    On sums of full rank this is the paper. A sum of adapters has rank Σ r_i at most, and there the
    paper's formula spreads the mean over min(m, n) directions, most of them chance. Here mean and
    product run over the directions whose value is not zero (``core_space``).

    Args:
        deltas: One change [m, n] per contribution.
        weights_C: Weight per contribution [C], positive, 1 on average.
        config: How many directions to keep.

    Returns:
        The merged change [m, n]: factors where all inputs are factors. Not the input where all
        inputs are equal: its spectrum is flattened too.
    """
    space = core_space(deltas)
    return space.lift(flattened(directions(space.total(weights_C), config.rank)))


def flattened(found: Directions) -> Directions:
    """The same with every singular value replaced by their mean."""
    return found._replace(s_r=found.s_r.mean().expand_as(found.s_r))


ISO_C = MergeMethod(name="iso_c", config=IsoCConfig, scope="tensor", matrices=iso_c)
