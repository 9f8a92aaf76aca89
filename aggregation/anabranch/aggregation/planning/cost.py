"""What going through dense entries costs: passes and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anabranch.aggregation.checkpoints.merged_rows import matrix_bytes
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.engine.rows import FP32_BYTES, WORKING_COPIES, ModuleRows
from anabranch.aggregation.engine.whole_module import WholeModule
from anabranch.aggregation.method import MergeMethod

COUNTER_BYTES = 8 << 16
"""What finding one exact k-th in a stream takes: a histogram of 65,536 counters, on top of the
budget."""


@dataclass(frozen=True)
class Cost:
    """Passes over each module's entries, and the memory they take together."""

    passes: Mapping[str, int]
    memory_bytes: int


def joined(costs: Sequence[Cost]) -> Cost:
    """What one merge after the other takes: the memory is that of the largest."""
    passes = {module: count for cost in costs for module, count in cost.passes.items()}
    return Cost(passes, max(cost.memory_bytes for cost in costs))


def nothing(cohort: Cohort) -> Cost:
    """What modules take that stay as they are."""
    return Cost(dict.fromkeys(cohort.deltas, 0), 0)


def matrix_cost(cohort: Cohort, method: MergeMethod) -> Cost:
    """What whole dense matrices take, one module at a time."""
    # The norms of the task vectors, and a merge for the norm of the result, come first.
    passes = dict.fromkeys(cohort.deltas, 3 if method.mean_norm else 1)
    return Cost(passes, max((matrix_bytes(cohort, m, method) for m in cohort.deltas), default=0))


def entry_cost(
    cohort: Cohort,
    group: Group,
    budget_bytes: int,
    *,
    keeps_result: bool,
    keep_model: bool = True,
) -> Cost:
    """What going through dense entries takes, by the rules ``EntryMerge`` and ``gram`` follow."""
    count, method, config = len(cohort), group.method, group.config
    if method.whole_tensors:
        return _whole_cost(cohort, group, budget_bytes, keeps_result)
    gathers = bool(method.statistics)
    whole_model = gathers and method.scope_of(config) == "model"
    everything = cohort.entries() * (cohort.held_per_entry + 1) * FP32_BYTES
    keep_all = keep_model and whole_model and everything <= budget_bytes // 2
    passes, working, kept_bytes, counters = {}, 0, everything if keep_all else 0, 0
    for module, parts in cohort.deltas.items():
        rows = ModuleRows(cohort, module, budget_bytes, gathers, method.whole_vectors)
        row_bytes = cohort.held_per_entry * rows.columns * FP32_BYTES
        several = whole_model or len(rows) > 1
        # An exact k-th takes two passes unless the whole scope is one chunk.
        kths = several * sum(s.how.startswith("kth") for s in method.statistics)
        first = len(method.statistics) + kths
        # Beside its own, a rank holds those of another and the sum.
        copies = 3 if whole_model and cohort.ranks.count > 1 else 1
        counters = max(counters, copies * COUNTER_BYTES * count * bool(kths))
        whole_bytes = parts[0].shape.numel() * FP32_BYTES
        fits = rows.rows * row_bytes + whole_bytes <= budget_bytes // 2
        kept = keep_all if whole_model else gathers and fits
        passes[module] = (1 if kept else first + 1) + group.needs_gram
        if kept and not keep_all:
            kept_bytes = max(kept_bytes, rows.rows * row_bytes)
        if keeps_result and whole_bytes <= budget_bytes // 2:
            kept_bytes = max(kept_bytes, whole_bytes)
        working = max(working, min(rows.step, rows.rows) * row_bytes * WORKING_COPIES)
    return Cost(passes, working + kept_bytes + counters)


def _whole_cost(cohort: Cohort, group: Group, budget_bytes: int, keeps_result: bool) -> Cost:
    """What ranking whole tensors takes, one contribution at a time."""
    passes, most_bytes = {}, 0
    for module in cohort.deltas:
        whole = WholeModule(cohort, module, budget_bytes)
        passes[module] = -(-whole.entries // whole.side_by_side) + group.needs_gram
        result_bytes = whole.entries * FP32_BYTES * keeps_result
        most_bytes = max(most_bytes, whole.size_bytes + result_bytes)
    return Cost(passes, most_bytes)
