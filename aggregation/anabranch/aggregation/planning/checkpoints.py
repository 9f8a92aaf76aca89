"""What a merge of checkpoints reads, holds and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from anabranch.aggregation.checkpoints.inputs import Inputs
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.planning.cost import Cost, entry_cost, joined, matrix_cost, nothing
from anabranch.aggregation.planning.groups import planned, widest_scope
from anabranch.aggregation.planning.merge_plan import MergePlan, PlannedRank
from anabranch.aggregation.ranks import Ranks, deal


def plan_checkpoints(
    inputs: Inputs, parts: Sequence[Group], dtype: str | None, budget_bytes: int, count: int
) -> MergePlan:
    """Plan a merge of checkpoints whose headers are read, by so many ranks with a budget each."""
    sizes = {name: tensor.size_bytes for name, tensor in inputs.like.tensors.items()}
    ranks, passes = [], 0
    for rank, names in enumerate(deal(sizes, count)):
        cohort = replace(inputs.cohort.only(names), ranks=Ranks(rank, count, count))
        alone = len(parts) == 1
        cost = joined([_cost(cohort.only(g.modules), g, budget_bytes, alone) for g in parts])
        passes = max(passes, *cost.passes.values(), 0)
        ranks.append(
            PlannedRank(
                modules=len(names),
                memory_bytes=cost.memory_bytes,
                read_bytes=_read_bytes(inputs, names, cost),
                output_bytes=_output_bytes(inputs, names, dtype),
            )
        )
    return MergePlan(
        kind="checkpoints",
        names=inputs.cohort.names,
        method=parts[0].method.name,
        scope=widest_scope(parts),
        modules=len(inputs.cohort.deltas),
        groups=planned(parts),
        copied=len(inputs.copied),
        passes=passes,
        memory_bytes=sum(rank.memory_bytes for rank in ranks),
        read_bytes=sum(rank.read_bytes for rank in ranks),
        output_bytes=sum(rank.output_bytes for rank in ranks),
        ranks=tuple(ranks),
        warnings=inputs.warnings,
    )


def _read_bytes(inputs: Inputs, names: Sequence[str], cost: Cost) -> int:
    """What merging and copying these tensors reads at most."""
    everything = [*inputs.models, *([inputs.base] if inputs.base else [])]
    total = 0
    for name in names:
        size_bytes = inputs.like.tensors[name].size_bytes
        if name not in cost.passes:
            total += (2 * len(inputs.models) + 1) * size_bytes
            continue
        once = sum(model.tensors[name].size_bytes for model in everything)
        # The base once more, to add it to, where it is not at hand from the last pass.
        total += cost.passes[name] * once + (size_bytes if inputs.base else 0)
    # Importance is read for its mean, and again to merge by it.
    entries = inputs.cohort.only(names).entries()
    return total + 2 * inputs.importance_bytes * entries // inputs.cohort.entries()


def _output_bytes(inputs: Inputs, names: Sequence[str], dtype: str | None) -> int:
    width = None if dtype is None else getattr(torch, dtype).itemsize
    total = 0
    for name in names:
        tensor = inputs.like.tensors[name]
        merged = width if name in inputs.cohort.deltas else None
        total += tensor.shape.numel() * (merged or tensor.dtype.itemsize)
    return total


def _cost(cohort: Cohort, group: Group, budget_bytes: int, alone: bool) -> Cost:
    if group.excluded:
        return nothing(cohort)
    if group.method.matrices is not None:
        return matrix_cost(cohort, group.method)
    return entry_cost(cohort, group, budget_bytes, keeps_result=False, keep_model=alone)
