"""What a merge of checkpoints reads, holds and writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.aggregation.checkpoints.inputs import Inputs
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.planning.cost import Cost, entry_cost, joined, matrix_cost, nothing
from anabranch.aggregation.planning.groups import planned, widest_scope
from anabranch.aggregation.planning.merge_plan import MergePlan


def plan_checkpoints(
    inputs: Inputs, parts: Sequence[Group], dtype: str | None, budget_bytes: int
) -> MergePlan:
    """Plan a merge of checkpoints whose headers are read."""
    cost = joined([_cost(inputs, group, budget_bytes, len(parts) == 1) for group in parts])
    like = inputs.like.tensors
    everything = [*inputs.models, *([inputs.base] if inputs.base else [])]
    read_bytes = 0
    for module, passes in cost.passes.items():
        once = sum(model.tensors[module].size_bytes for model in everything)
        # The base once more, to add it to, where it is not at hand from the last pass.
        again = inputs.base.tensors[module].size_bytes if inputs.base else 0
        read_bytes += passes * once + again
    for name in inputs.copied:
        read_bytes += (2 * len(inputs.models) + 1) * like[name].size_bytes
    # Importance is read for its mean, and again to merge by it.
    read_bytes += 2 * inputs.importance_bytes
    width = None if dtype is None else getattr(torch, dtype).itemsize
    output_bytes = sum(
        tensor.shape.numel() * (width if width and name in cost.passes else tensor.dtype.itemsize)
        for name, tensor in like.items()
    )
    return MergePlan(
        kind="checkpoints",
        names=inputs.cohort.names,
        method=parts[0].method.name,
        scope=widest_scope(parts),
        modules=len(inputs.cohort.deltas),
        groups=planned(parts),
        copied=len(inputs.copied),
        passes=max(cost.passes.values()),
        memory_bytes=cost.memory_bytes,
        read_bytes=read_bytes,
        output_bytes=output_bytes,
        warnings=inputs.warnings,
    )


def _cost(inputs: Inputs, group: Group, budget_bytes: int, alone: bool) -> Cost:
    cohort = inputs.cohort.only(group.modules)
    if group.excluded:
        return nothing(cohort)
    if group.method.matrices is not None:
        return matrix_cost(cohort, group.method)
    return entry_cost(
        cohort, group.method, group.config, budget_bytes, keeps_result=False, keep_model=alone
    )
