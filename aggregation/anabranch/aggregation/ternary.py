"""Sparse ternary updates merged as they are, at a cost that follows their non-zeros.

For tensors whose entries mean the same at every client: dense deltas, heads, B against a shared
frozen A. A and B trained together do not (the mean of products is not the product of means).

Shape legend: C contributions, n entries of the dense tensor, k kept of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from anabranch.aggregation.election import elect_and_average
from anabranch.aggregation.kernels.rows import load, worthwhile
from anabranch.aggregation.method import combine
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC
from anabranch.aggregation.methods.ties import TIES
from anabranch.vectors.sparse import SparseTernary

Rule = Literal["mean", "task_arithmetic", "ties", "sign_vote"]

KERNEL = "anabranch.aggregation.kernels.ternary:merge"


def merge_ternary(
    updates: Sequence[SparseTernary], rule: Rule, weights: Sequence[float] | None = None
) -> Tensor:
    """Merge updates of one tensor without decoding any.

    TIES per tensor keeps all of an update, at any density: what is not zero is of one magnitude,
    so every entry ties with the last one kept. ``sign_vote`` is the sign of Σ w·sign τ times the
    weighted mean of the scales (Bernstein et al., 1802.04434, with a scale); an even vote is 0.

    Args:
        updates: One per contribution, of one shape.
        rule: How contributions become one.
        weights: Weight per contribution; None counts each once.

    Returns:
        The merged tensor, dense, fp32.

    Raises:
        ValueError: No updates, different shapes, or weights the method cannot use.
    """
    shapes = sorted({update.shape for update in updates})
    if len(shapes) != 1:
        raise ValueError(
            f"updates have {len(shapes)} shapes, {shapes[:2]}; give one update at least, and all "
            "of one tensor"
        )
    method = {"mean": MEAN, "task_arithmetic": TASK_ARITHMETIC}.get(rule, TIES)
    count = len(updates)
    given = [1.0] * count if weights is None else list(weights)
    weights_C = method.check_weights(torch.tensor(given, dtype=torch.float64), count)
    scales_C = torch.tensor([update.scale for update in updates], dtype=torch.float64)
    spread = float((weights_C * scales_C).sum() / weights_C.sum()) if rule == "sign_vote" else 1.0
    if rule == "mean":
        weights_C = weights_C / weights_C.sum()
    values_C = torch.ones_like(scales_C) if rule == "sign_vote" else scales_C
    if worthwhile(1, sum(update.nonzeros for update in updates), torch.device("cpu")):
        merged_n: Tensor = load(KERNEL)(updates, values_C, weights_C, rule == "ties")
    else:
        merged_n = _by_decoding(updates, values_C, weights_C, rule == "ties")
    if rule == "sign_vote":
        merged_n = merged_n.sign_().mul_(spread)
    return merged_n.view(shapes[0])


def _by_decoding(
    updates: Sequence[SparseTernary], values_C: Tensor, weights_C: Tensor, elects: bool
) -> Tensor:
    """The same [n], by the functions that merge dense tensors."""
    deltas_Cn = torch.zeros(len(updates), updates[0].entries)
    for delta_n, update, value in zip(deltas_Cn, updates, values_C.tolist(), strict=True):
        delta_n[update.positions_k] = torch.where(update.negative_k, -value, value).float()
    merge = elect_and_average if elects else combine
    return merge(deltas_Cn, weights_C)
