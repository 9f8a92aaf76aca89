"""Merges adapters into one: task vectors, merge, start added back, refactor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from anabranch.aggregation.backdoor.suspicion import SuspicionReport
from anabranch.aggregation.engine.cohort import (
    checked,
    common_base,
    contribution_names,
    side_by_side,
)
from anabranch.aggregation.engine.device import placed
from anabranch.aggregation.engine.gram import module_grams, total_gram
from anabranch.aggregation.engine.groups import groups
from anabranch.aggregation.engine.importance import with_importance
from anabranch.aggregation.engine.job import AdapterMerge, Progress
from anabranch.aggregation.engine.refactor import Spectrum
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES
from anabranch.aggregation.engine.stream import group_coefficients
from anabranch.aggregation.engine.suspected import Portion, check_suspicion, judge, portions
from anabranch.aggregation.method import MergeMethod, cosines
from anabranch.aggregation.ranks import ALONE, Ranks
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.withdrawal import remaining
from anabranch.vectors.adapter import Adapter, LoraFactors, task_vector
from anabranch.vectors.task_vector import TaskVector

Value = TypeVar("Value")


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
        suspicion: Who stood out, by what, and what was done; None where nobody looked.
    """

    names: tuple[str, ...]
    coefficients: tuple[float, ...] | None
    truncation: Mapping[str, float]
    overall_truncation: float
    cosine: tuple[tuple[float, ...], ...]
    suspicion: SuspicionReport | None = None


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
        weights: Weight per contribution, where no rule of the recipe says otherwise; None takes the
            recipe's, and without any counts each once.
        names: What to call the contributions in messages and in the report.
        without: Names of contributions to leave out, as if they had never been given; see
            ``withdrawal.remaining``.
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
    stay = remaining(contribution_names(names, len(adapters)), without, recipe, weights)
    adapters, names = [adapters[index] for index in stay.indices], stay.names
    starts = None if starts is None else [starts[index] for index in stay.indices]
    origins: Sequence[Adapter | None] = starts or [start] * len(adapters)
    vectors = _task_vectors(adapters, origins, names)
    cohort = side_by_side(vectors, names)
    parts = groups(stay.recipe, cohort.deltas, len(cohort))
    for group in parts:
        check_refactor(recipe, group.method, adapters)
        if recipe.suspicion is not None:
            check_suspicion(recipe.suspicion, group.method, len(adapters))
    cohort = checked(cohort.share_of(ranks))
    grams = module_grams(cohort, budget_bytes)
    tick = _counter(progress, sum(module in adapters[0].lora for module in cohort.deltas))
    suspicion = decided = None
    if recipe.suspicion is not None:
        suspicion, decided = judge(cohort, grams, adapters, origins, recipe.suspicion)
    merged = _Merged({}, {}, {}, {})
    for portion in (part for group in parts for part in portions(group, len(adapters), decided)):
        group, kept = portion.group, portion.kept
        alike = portion.cohort(cohort)
        alike = with_importance(alike, [vectors[index] for index in kept], group.method)
        alike = placed(alike, group.method, device)
        job = AdapterMerge(
            [adapters[index] for index in kept],
            start,
            None if starts is None else [starts[index] for index in kept],
            recipe.refactor,
            group,
            alike,
            portion.grams(grams),
            budget_bytes,
            tick,
            scaled=any(portion.factors[index] != 1 for index in kept),
        )
        merged = merged.joined(_merge_group(job, portion))
    merged = reduce(_Merged.joined, ranks.gather(merged))
    base_hash = cohort.base_hash
    if start is not None:
        base_hash = common_base([base_hash, start.base_hash], [names[0], "the start"])
    first = adapters[0]
    if decided is not None:
        first = next(a for a, f in zip(adapters, decided.elsewhere, strict=True) if f)
    like = first if start is None else start
    adapter = Adapter(_sorted(merged.lora), _sorted(merged.dense), base_hash, like.peft)
    spectra = _sorted(merged.spectra)
    norm, residual = (
        math.hypot(*(getattr(spectrum, part) for spectrum in spectra.values()))
        for part in ("norm", "residual")
    )
    report = MergeReport(
        names=names,
        coefficients=_shared(merged.coefficients),
        truncation={m: s.residual / s.norm if s.norm else 0.0 for m, s in spectra.items()},
        overall_truncation=residual / norm if norm else 0.0,
        cosine=tuple(tuple(row) for row in cosines(total_gram(grams, len(cohort))).tolist()),
        suspicion=None
        if suspicion is None or decided is None
        else SuspicionReport(
            scores=dict(suspicion.scores),
            strongest=dict(suspicion.strongest),
            findings=decided.findings,
        ),
    )
    return MergeResult(adapter, report)


@dataclass(frozen=True)
class _Merged:
    """What came of some modules; ``coefficients`` is None where one of them has none."""

    lora: Mapping[str, LoraFactors]
    dense: Mapping[str, Tensor]
    spectra: Mapping[str, Spectrum]
    coefficients: Mapping[str, Sequence[float]] | None

    def joined(self, other: _Merged) -> _Merged:
        coefficients = None
        if self.coefficients is not None and other.coefficients is not None:
            coefficients = {**self.coefficients, **other.coefficients}
        return _Merged(
            {**self.lora, **other.lora},
            {**self.dense, **other.dense},
            {**self.spectra, **other.spectra},
            coefficients,
        )


def _merge_group(job: AdapterMerge, portion: Portion) -> _Merged:
    """Merge some modules of a group, in the way its method goes through adapters."""
    method = job.group.method
    coefficients = None
    spectra: dict[str, Spectrum] = {}
    if job.group.excluded or method.coefficients is not None:
        coefficients = group_coefficients(job.cohort, job.group, job.budget_bytes, job.grams)
    if job.group.excluded:
        lora = job.kept()
    elif coefficients is not None:
        lora, spectra = job.linear(coefficients)
    elif method.matrices is not None:
        lora, spectra = job.matrices()
    elif method.factors:
        lora = job.factors()
    else:
        lora, spectra = job.entries()
    dense = job.dense(coefficients)
    if coefficients is not None:
        coefficients = {module: portion.spread(shared) for module, shared in coefficients.items()}
    return _Merged(lora, dense, spectra, coefficients)


def _sorted(by_module: Mapping[str, Value]) -> dict[str, Value]:
    return {module: by_module[module] for module in sorted(by_module)}


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Says that one more of all modules is done."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


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
