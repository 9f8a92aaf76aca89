"""FedIT (Zhang et al., 2305.05644): A and B averaged apart. A baseline, biased on ΔW.

mean(B)·mean(A) is not mean(B·A): the cross terms B_i·A_j are noise unless all adapters share A or
share B. It is here to be compared with.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.mean import mean


class FedItConfig(MethodConfig):
    """No parameters."""


def fedit(entries_CD: Tensor, weights_C: Tensor, config: FedItConfig | None = None) -> Tensor:
    """Weighted mean, called by the engine once on the As and once on the Bs of a module.

    Args:
        entries_CD: Entries of one factor [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Not read.

    Returns:
        Averaged entries [D].
    """
    return mean(entries_CD, weights_C)


FEDIT = MergeMethod(name="fedit", config=FedItConfig, scope="entry", merge=fedit, factors=True)
