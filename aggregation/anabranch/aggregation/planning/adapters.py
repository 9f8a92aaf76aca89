"""What a merge of adapters reads, holds and writes, and whether they belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from anabranch.aggregation.checkpoints.merge import check_count
from anabranch.aggregation.compatible import check_tokenizers
from anabranch.aggregation.engine.adapters import check_refactor
from anabranch.aggregation.engine.cohort import Cohort, common_base, side_by_side
from anabranch.aggregation.engine.groups import Group, groups
from anabranch.aggregation.engine.importance import with_importance
from anabranch.aggregation.engine.rows import FP32_BYTES
from anabranch.aggregation.engine.suspected import check_suspicion
from anabranch.aggregation.planning.cost import Cost, entry_cost, joined, nothing
from anabranch.aggregation.planning.groups import planned, widest_scope
from anabranch.aggregation.planning.merge_plan import MergePlan, PlannedRank
from anabranch.aggregation.ranks import Ranks
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.registry import named
from anabranch.vectors.adapter import Adapter
from anabranch.vectors.fisher_file import fisher_layout
from anabranch.vectors.importance import flat_importance
from anabranch.vectors.peft_config import CONFIG_FILE
from anabranch.vectors.peft_folder import adapter_layout
from anabranch.vectors.task_vector import TaskVector


def plan_adapters(
    folders: Sequence[Path],
    names: Sequence[str],
    start: Path | None,
    recipe: Recipe,
    budget_bytes: int,
    count: int,
) -> MergePlan:
    """Plan a merge of PEFT folders by so many ranks, from their configurations and headers.

    Raises:
        ValueError: Adapters that do not belong together.
    """
    adapters = [adapter_layout(folder) for folder in folders]
    if named(recipe).needs_importance:
        adapters = [
            replace(adapter, importance=fisher_layout(folder))
            for adapter, folder in zip(adapters, folders, strict=True)
        ]
    begun = None if start is None else adapter_layout(start)
    warnings = check_tokenizers(list(zip(names, folders, strict=True)))
    everyone = list(zip(names, adapters, strict=True))
    if begun is not None:
        everyone.append((f"the start {start}", begun))
    warnings += _check_named_bases(everyone)
    cohort = side_by_side([_layout(adapter) for _, adapter in everyone], [n for n, _ in everyone])
    for name, adapter in everyone:
        if adapter.dense and begun is None:
            trained = ", ".join(sorted(adapter.dense))
            raise ValueError(
                f"{name}: holds weights trained in full ({trained}); "
                "name the adapter they started from with --start"
            )
    alone = {module: parts[: len(adapters)] for module, parts in cohort.deltas.items()}
    contributions = Cohort(tuple(names), alone, cohort.base_hash)
    vectors = [_layout(one) for one in adapters]
    parts = groups(recipe, alone, len(adapters))
    for group in parts:
        check_refactor(recipe, group.method, adapters)
        if recipe.suspicion is not None:
            check_suspicion(recipe.suspicion, group.method, len(adapters))
    like = adapters[0] if begun is None else begun
    held = sum(tensor.numel() for adapter in adapters for tensor in _tensors(adapter))
    read_bytes = sum(_size_bytes(adapter) for _, adapter in everyone)
    output_bytes = _output_bytes(recipe, parts, adapters, like)
    ranks, passes = [], 0
    for rank in range(count):
        mine = contributions.share_of(Ranks(rank, count, count))
        costs = []
        for group in parts:
            alike = with_importance(mine.only(group.modules), vectors, group.method)
            costs.append(_cost(alike, group, budget_bytes))
        cost = joined(costs)
        passes = max(passes, *cost.passes.values(), 0)
        # Every rank reads the adapters, which are small, and the first writes the result.
        memory_bytes = held * FP32_BYTES + cost.memory_bytes
        written_bytes = 0 if rank else output_bytes
        ranks.append(PlannedRank(len(mine.deltas), memory_bytes, read_bytes, written_bytes))
    return MergePlan(
        kind="adapters",
        names=tuple(names),
        method=parts[0].method.name,
        scope=widest_scope(parts),
        modules=len(alone),
        groups=planned(parts),
        copied=0,
        passes=passes,
        memory_bytes=sum(rank.memory_bytes for rank in ranks),
        read_bytes=read_bytes * count,
        output_bytes=output_bytes,
        ranks=tuple(ranks),
        warnings=tuple(warnings),
    )


def _cost(cohort: Cohort, group: Group, budget_bytes: int) -> Cost:
    method = group.method
    if group.excluded:
        return nothing(cohort)
    check_count(group, cohort.names)
    if method.merge is not None and not method.factors:
        return entry_cost(cohort, group, budget_bytes, keeps_result=True)
    return Cost(dict.fromkeys(cohort.deltas, 1 + group.needs_gram), 0)


def _layout(adapter: Adapter) -> TaskVector:
    """An adapter's modules and shapes as a task vector without numbers."""
    deltas = {name: factors.delta() for name, factors in adapter.lora.items()}
    return TaskVector({**deltas, **adapter.dense}, adapter.base_hash, adapter.importance)


def _check_named_bases(everyone: Sequence[tuple[str, Adapter]]) -> list[str]:
    """Compare the bases that adapters name, unless hashes of the weights decide.

    Returns:
        Warnings, one line each: one name under two paths.
    """
    common_base([adapter.base_hash for _, adapter in everyone], [name for name, _ in everyone])
    if all(adapter.base_hash is not None for _, adapter in everyone):
        return []
    warnings = []
    named = [(name, a.peft.get("base_model_name_or_path")) for name, a in everyone]
    stated = [(name, str(value)) for name, value in named if value]
    for name, value in stated[1:]:
        whose, first = stated[0]
        if Path(value).name != Path(first).name:
            raise ValueError(
                f"{name}: base_model_name_or_path: is {value!r}, in {whose} it is {first!r}; merge "
                f"adapters of one base, or correct {CONFIG_FILE} if these are one"
            )
        if value != first:
            warnings.append(f"{name}: names its base {value!r}, {whose} names it {first!r}")
    return warnings


def _output_bytes(
    recipe: Recipe, parts: Sequence[Group], adapters: Sequence[Adapter], like: Adapter
) -> int:
    kept = {module for group in parts if group.excluded for module in group.modules}
    total = sum(t.numel() * t.element_size() for t in like.dense.values())
    for module, factors in like.lora.items():
        ranks = [adapter.lora[module].rank for adapter in adapters]
        if module in kept:
            rank = factors.rank
        elif recipe.refactor.kind == "stack":
            rank = sum(ranks)
        else:
            rank = recipe.refactor.rank or max(ranks)
        per_rank = len(factors.b_mr) + factors.a_rn.shape[1]
        total += rank * per_rank * factors.a_rn.element_size()
    return total


def _size_bytes(adapter: Adapter) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(adapter))


def _tensors(adapter: Adapter) -> list[Tensor]:
    return [*adapter.tensors().values(), *flat_importance(adapter.importance).values()]
