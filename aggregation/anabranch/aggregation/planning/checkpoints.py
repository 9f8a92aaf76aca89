"""What a merge of checkpoints reads, holds and writes."""

from __future__ import annotations

import torch

from anabranch.aggregation.checkpoints.inputs import Inputs
from anabranch.aggregation.checkpoints.merged_rows import check_budget
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.planning.cost import entry_cost, matrix_cost
from anabranch.aggregation.planning.merge_plan import MergePlan


def plan_checkpoints(
    inputs: Inputs, method: MergeMethod, config: MethodConfig, dtype: str | None, budget_bytes: int
) -> MergePlan:
    """Plan a merge of checkpoints whose headers are read."""
    check_budget(inputs.cohort, method, budget_bytes)
    if method.matrices is not None:
        cost = matrix_cost(inputs.cohort, method)
    else:
        cost = entry_cost(inputs.cohort, method, config, budget_bytes, keeps_result=False)
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
        method=method.name,
        scope=method.scope_of(config),
        modules=len(inputs.cohort.deltas),
        copied=len(inputs.copied),
        passes=max(cost.passes.values()),
        memory_bytes=cost.memory_bytes,
        read_bytes=read_bytes,
        output_bytes=output_bytes,
        warnings=inputs.warnings,
    )
