"""Merges adapters into one: task vectors, merge, start added back, refactor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from anabranch.aggregation.engine.cohort import (
    checked,
    common_base,
    contribution_names,
    side_by_side,
)
from anabranch.aggregation.engine.device import placed
from anabranch.aggregation.engine.gram import module_grams, total_gram
from anabranch.aggregation.engine.importance import with_importance
from anabranch.aggregation.engine.job import AdapterMerge, Progress
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES
from anabranch.aggregation.engine.stream import cohort_coefficients, cohort_weights
from anabranch.aggregation.method import MergeMethod, cosines
from anabranch.aggregation.ranks import ALONE, Ranks
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.registry import resolve
from anabranch.aggregation.withdrawal import withdraw
from anabranch.vectors.adapter import Adapter, task_vector
from anabranch.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, in plain numbers.

    Attributes:
        names: The contributions, in order.
        coefficients: c_i per contribution where the method is Σ c_i·ΔW_i, before the recipe's
            scale; None where it is not, or where they differ from module to module.
        truncation: ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F per module that went back to rank r; 0 where ΔW is 0.
            Empty where nothing was truncated.
        overall_truncation: The same over all modules together.
        cosine: Cosine similarity of the task vectors, pair by pair [C][C].
    """

    names: tuple[str, ...]
    coefficients: tuple[float, ...] | None
    truncation: Mapping[str, float]
    overall_truncation: float
    cosine: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MergeResult:
    """A merged adapter and the report on it."""

    adapter: Adapter
    report: MergeReport


def merge_adapters(
    adapters: Sequence[Adapter],
    recipe: Recipe,
    *,
    start: Adapter | None = None,
    starts: Sequence[Adapter] | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    without: Sequence[str] = (),
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> MergeResult:
    """Merge adapters into one of the recipe's rank: start + scale·merge(adapter_i − start).

    Alpha, rsLoRA, dtype and PEFT configuration follow the start, or the first adapter without one.

    Args:
        adapters: The contributions' adapters, trained from ``start``.
        recipe: How to merge them, and the way back to rank r.
        start: The adapter all of them started from; None stands for the bare base.
        starts: What each of them started from, where that is ``start`` at a lower rank (FlexLoRA,
            2402.11505): what each adds to its own is merged, and added to ``start``.
        weights: Weight per contribution; None takes the recipe's, and without any counts each once.
        names: What to call the contributions in messages and in the report.
        without: Names of contributions to leave out, as if they had never been given; see
            ``withdraw``.
        budget_bytes: Memory for dense entries of the inputs; one merged module comes out of it too,
            where it fits half, and is formed again on every read where it does not.
        device: Where methods that decide entry by entry go through them, as ``cuda``: a chunk at a
            time is moved there. None merges them where they lie. ``budget_bytes`` is its memory.
        progress: Called with the modules done and all there are, of this rank.
        ranks: Who merges these adapters together, each a part of the modules and of the budget. All
            of them get the result.

    Raises:
        ValueError: Bad recipe, weights or adapters, in one line that names the contribution.
        LostRankError: Another rank is gone.
    """
    budget_bytes //= ranks.local_count
    method, config = resolve(recipe)
    names = contribution_names(names, len(adapters))
    if without:
        stay = withdraw(names, without, recipe, weights)
        adapters, names = [adapters[index] for index in stay.indices], stay.names
        starts = None if starts is None else [starts[index] for index in stay.indices]
        weights = stay.weights
    check_refactor(recipe, method, adapters)
    vectors = _task_vectors(adapters, starts or [start] * len(adapters), names)
    cohort = checked(side_by_side(vectors, names).share_of(ranks))
    weights_C = cohort_weights(method, recipe, weights, len(cohort))
    grams = module_grams(cohort, budget_bytes)
    job = AdapterMerge(
        list(adapters),
        start,
        starts,
        recipe,
        method,
        config,
        placed(with_importance(cohort, vectors, method), method, device),
        weights_C,
        budget_bytes,
        progress,
    )
    coefficients = None
    if method.coefficients is not None:
        coefficients = ranks.union(cohort_coefficients(cohort, method, config, weights_C, grams))
        lora, spectra = job.linear(coefficients)
    elif method.matrices is not None:
        lora, spectra = job.matrices()
    elif method.factors:
        lora, spectra = job.factors(), {}
    else:
        lora, spectra = job.entries()
    lora, spectra = ranks.union(lora), ranks.union(spectra)
    dense = ranks.union(job.dense(coefficients))
    base_hash = cohort.base_hash
    if start is not None:
        base_hash = common_base([base_hash, start.base_hash], [names[0], "the start"])
    adapter = Adapter(lora, dense, base_hash, job.reference.peft)
    norm, residual = (
        math.hypot(*(getattr(spectrum, part) for spectrum in spectra.values()))
        for part in ("norm", "residual")
    )
    report = MergeReport(
        names=names,
        coefficients=_shared(coefficients),
        truncation={m: s.residual / s.norm if s.norm else 0.0 for m, s in spectra.items()},
        overall_truncation=residual / norm if norm else 0.0,
        cosine=tuple(tuple(row) for row in cosines(total_gram(grams, len(cohort))).tolist()),
    )
    return MergeResult(adapter, report)


def check_refactor(recipe: Recipe, method: MergeMethod, adapters: Sequence[Adapter]) -> None:
    """Refuse a way back to an adapter that the method or the modules do not have.

    Zeros up to a mistyped rank would fill the memory.

    Raises:
        ValueError: Stacking what is no sum of products, or a rank above every module's.
    """
    if recipe.refactor.kind == "stack" and method.merge is not None:
        raise ValueError(
            f"refactor.kind: stack keeps exact factors, and {method.name} gives no such sum; "
            "set it to svd"
        )
    rank = recipe.refactor.rank
    modules = [factors for adapter in adapters for factors in adapter.lora.values()]
    largest = max((min(len(one.b_mr), one.a_rn.shape[1]) for one in modules), default=0)
    if rank is not None and modules and rank > largest:
        raise ValueError(
            f"refactor.rank: {rank} is above {largest}, the largest any module can have; lower it"
        )


def _shared(coefficients: Mapping[str, Sequence[float]] | None) -> tuple[float, ...] | None:
    """The coefficients that all modules have in common, None where they do not."""
    distinct = {tuple(shared) for shared in (coefficients or {}).values()}
    return distinct.pop() if len(distinct) == 1 else None


def _task_vectors(
    adapters: Sequence[Adapter], starts: Sequence[Adapter | None], names: Sequence[str]
) -> list[TaskVector]:
    """Task vectors against their starts, with the contribution's name on what goes wrong."""
    vectors = []
    for name, adapter, start in zip(names, adapters, starts, strict=True):
        try:
            vectors.append(task_vector(adapter, start))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return vectors
