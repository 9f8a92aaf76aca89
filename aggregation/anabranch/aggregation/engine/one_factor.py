"""Merges adapters that share one LoRA factor: the other is a parameter like any trained in full.

FFA-LoRA (Sun et al., 2403.12313) keeps A where the seed put it, RoLoRA (Chen et al., 2409.02346)
keeps A in one round and B in the next. With A shared, Σ c_i·B_i·A = (Σ c_i·B_i)·A: nothing is
truncated, there is no basis to lose, and an entry of B means the same thing in every contribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from anabranch.aggregation.engine.adapters import MergeResult, merge_adapters
from anabranch.aggregation.engine.cohort import contribution_names
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES
from anabranch.aggregation.recipe import Recipe, Refactor
from anabranch.vectors.adapter import Adapter


def merge_one_factor(
    adapters: Sequence[Adapter],
    recipe: Recipe,
    trained: Literal["a", "b"],
    *,
    start: Adapter,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> MergeResult:
    """Merge the one factor that was trained: start + scale·merge(factor_i − start's factor).

    Methods see the entries of the factor, not those of ΔW. For those that are linear it makes no
    difference: the result is exactly Σ c_i·ΔW_i. There is no way back to rank r to go, so the
    recipe's refactor is not read; the report's cosines are those of the trained factors.

    Args:
        adapters: The contributions' adapters, trained from ``start``.
        recipe: Method and scale. Its rules go by the names of modules, as ever.
        trained: The factor that differs.
        start: The adapter all of them started from, whose other factor they share.
        weights: Weight per contribution, where no rule of the recipe says otherwise; None takes the
            recipe's, and without any counts each once.
        names: What to call the contributions in messages and in the report.
        budget_bytes: Memory for dense entries.

    Raises:
        ValueError: A contribution has another factor to share, or what ``merge_adapters`` refuses.
    """
    names = contribution_names(names, len(adapters))
    for name, adapter in zip(names, adapters, strict=True):
        _check_shared(name, adapter, start, trained)
    result = merge_adapters(
        [_as_parameters(adapter, trained) for adapter in adapters],
        recipe.model_copy(update={"refactor": Refactor()}),
        start=_as_parameters(start, trained),
        weights=weights,
        names=names,
        budget_bytes=budget_bytes,
    )
    merged = start.with_tensors({**start.tensors(), **result.adapter.dense})
    return MergeResult(merged, result.report)


def _as_parameters(adapter: Adapter, trained: Literal["a", "b"]) -> Adapter:
    """An adapter without factors: what was trained stands among the parameters trained in full."""
    parameters = adapter.tensors(trained)
    return Adapter({}, parameters, adapter.base_hash, adapter.peft, adapter.importance)


def _check_shared(name: str, adapter: Adapter, start: Adapter, trained: Literal["a", "b"]) -> None:
    """Entries of one factor compare only beside the same other factor and scaling."""
    if sorted(adapter.lora) != sorted(start.lora):
        odd = ", ".join(sorted(adapter.lora.keys() ^ start.lora.keys())[:3])
        raise ValueError(f"{name} and the start adapt different modules, such as {odd}")
    for module, mine in adapter.lora.items():
        theirs = start.lora[module]
        kept, wanted = (mine.a_rn, theirs.a_rn) if trained == "b" else (mine.b_mr, theirs.b_mr)
        if mine.scaling != theirs.scaling or not torch.equal(kept, wanted):
            other = "A" if trained == "b" else "B"
            raise ValueError(
                f"{name}: module {module} does not share {other} and its scaling with the start; "
                "merge it with merge, which takes any factors"
            )
