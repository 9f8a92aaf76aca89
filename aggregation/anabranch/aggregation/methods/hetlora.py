"""HetLoRA (Cho et al., 2401.06432): A and B of mixed ranks averaged apart, padded with zeros.

As with FedIT, mean(B)·mean(A) is not mean(B·A). What it has beyond FedIT is that clients of any
rank take part, and that those whose ΔW is larger count for more: a client of low rank would
otherwise shrink the directions it does not have. The paper's clients also prune their own rank as
they train; here the federation sets it (``ranks``).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.mean import mean


class HetLoraConfig(MethodConfig):
    """No parameters."""


def hetlora(entries_CD: Tensor, weights_C: Tensor, config: HetLoraConfig | None = None) -> Tensor:
    """Weighted mean, called by the engine once on the padded As and once on the padded Bs.

    Args:
        entries_CD: Entries of one factor [C, D].
        weights_C: Weight per contribution [C], as ``by_norm`` gives it.
        config: Not read.

    Returns:
        Averaged entries [D].
    """
    return mean(entries_CD, weights_C)


def by_norm(weights_C: Tensor, norms_C: Tensor) -> Tensor:
    """w_i·‖ΔW_i‖ [C], the paper's sparsity weights; w_i where all of them are zero.

    Args:
        weights_C: Weight per contribution [C].
        norms_C: ‖B_i·A_i‖_F per contribution in one module [C].
    """
    weighed_C = weights_C * norms_C
    return weighed_C if bool(weighed_C.any()) else weights_C


HETLORA = MergeMethod(
    name="hetlora", config=HetLoraConfig, scope="entry", merge=hetlora, factors=True, weigh=by_norm
)
