"""How contributions that disagree on an entry become one number.

Contributions are added one at a time: no [C, D] temporaries, and one order of addition however the
entries are chunked, which torch's own sum over C does not promise.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.aggregation.method import combine


def elected_signs(deltas_CD: Tensor, weights_C: Tensor) -> Tensor:
    """The sign of Σ w τ per entry, +1 or −1 [D].

    A sum of exactly zero elects +1 (mergekit, PEFT), and not the sign of the whole vector (the code
    of the TIES paper).
    """
    return torch.where(combine(deltas_CD, weights_C) >= 0, 1.0, -1.0)


def disjoint_mean(deltas_CD: Tensor, weights_C: Tensor, signs_D: Tensor) -> Tensor:
    """Per entry, the weighted mean of the contributions that are not zero and carry the sign.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        signs_D: +1 or −1 per entry [D].

    Returns:
        Merged entries [D]: 0 where no contribution agrees.
    """
    sum_D, share_D = torch.zeros_like(signs_D), torch.zeros_like(signs_D)
    for delta_D, weight in zip(deltas_CD, weights_C.tolist(), strict=True):
        agreeing_D = (delta_D * signs_D).clamp_(min=0)
        sum_D.add_(agreeing_D, alpha=weight)
        share_D.add_(agreeing_D > 0, alpha=weight)
    return sum_D.mul_(signs_D).div_(torch.where(share_D == 0, 1.0, share_D))


def elect_and_average(deltas_CD: Tensor, weights_C: Tensor) -> Tensor:
    """TIES after its trim: the mean of those whose sign is that of Σ w τ [D]; see the two above."""
    return disjoint_mean(deltas_CD, weights_C, elected_signs(deltas_CD, weights_C))


def weighted_mean(deltas_CD: Tensor, weights_C: Tensor) -> Tensor:
    """Σ w τ / Σ w [D], for weights of any positive sum."""
    return combine(deltas_CD, weights_C / weights_C.sum())
