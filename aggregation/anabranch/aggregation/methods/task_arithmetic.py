"""Task arithmetic: the plain weighted sum (Ilharco et al., 2212.04089).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine


class TaskArithmeticConfig(MethodConfig):
    """No parameters: λ is the recipe's ``scale``, a weight below zero forgets a task."""


def task_arithmetic_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None = None, config: TaskArithmeticConfig | None = None
) -> Tensor:
    """The weights as they are [C]: not divided by their sum.

    Args:
        weights_C: Weight per contribution [C], of any sign.
        gram_CC: Not read.
        config: Not read.
    """
    return weights_C


def task_arithmetic(
    deltas_CD: Tensor, weights_C: Tensor, config: TaskArithmeticConfig | None = None
) -> Tensor:
    """Σ w_i τ_i.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], of any sign.
        config: Not read.

    Returns:
        Merged entries [D].
    """
    return combine(deltas_CD, weights_C)


TASK_ARITHMETIC = MergeMethod(
    name="task_arithmetic",
    config=TaskArithmeticConfig,
    scope="entry",
    coefficients=task_arithmetic_coefficients,
    signed_weights=True,
)
