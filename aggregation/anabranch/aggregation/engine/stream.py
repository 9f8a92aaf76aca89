"""Merges task vectors by a recipe, module by module.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from anabranch.aggregation.engine.cohort import (
    Cohort,
    check_dense,
    checked,
    contribution_names,
    side_by_side,
)
from anabranch.aggregation.engine.device import placed
from anabranch.aggregation.engine.entries import EntryMerge
from anabranch.aggregation.engine.gram import module_grams
from anabranch.aggregation.engine.groups import Group, groups
from anabranch.aggregation.engine.importance import with_importance
from anabranch.aggregation.engine.mixture import mixture
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES, device_of, large_ternary
from anabranch.aggregation.engine.sample import sampled
from anabranch.aggregation.engine.suspected import check_not_judged
from anabranch.aggregation.kernels.rows import (
    TERNARY_SUM,
    WEIGHTED_SUM,
    all_worthwhile,
    load,
    readable,
)
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.withdrawal import remaining
from anabranch.vectors.task_vector import (
    Delta,
    Held,
    LowRank,
    TaskVector,
    held,
    scaled,
    stack,
)


def merge_task_vectors(
    vectors: Sequence[TaskVector],
    recipe: Recipe,
    *,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    without: Sequence[str] = (),
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    device: str | torch.device | None = None,
) -> TaskVector:
    """Merge task vectors by a recipe, in bounded memory.

    Bytes moved: a linear method reads factors or dense entries once (twice with a Gram matrix) and
    never forms a ΔW; nor does a method on matrices, for factors. It takes dense modules whole, as
    they are held, and works on a few fp64 copies (KnOTS on C) of one at a time, outside the budget.
    Others form each ΔW once where a module's C dense copies fit half the budget, else once per
    pass: one pass and those of the statistics (two for a threshold). The result does not depend on
    the budget.

    Args:
        vectors: One task vector per contribution.
        recipe: Method, parameters and scale; its ``refactor`` is not read here.
        weights: Weight per contribution, where no rule of the recipe says otherwise; None takes the
            recipe's, and without any counts each once.
        names: What to call the contributions in messages.
        without: Names of contributions to leave out, as if they had never been given; see
            ``withdrawal.remaining``.
        budget_bytes: Memory for dense entries of the inputs; the result comes on top.
        device: Where methods that decide entry by entry go through them, as ``cuda``: a chunk at a
            time is moved there. None merges them where they lie. ``budget_bytes`` is its memory.

    Returns:
        The merged task vector: factors where a method that is linear or on matrices met factors
        only, else entries.

    Raises:
        ValueError: Bad recipe, weights or task vectors, in one line.
    """
    check_not_judged(recipe.suspicion, "task vectors")
    stay = remaining(contribution_names(names, len(vectors)), without, recipe, weights)
    vectors = [vectors[index] for index in stay.indices]
    cohort = side_by_side(vectors, stay.names)
    parts = groups(stay.recipe, cohort.deltas, len(cohort))
    # A number that is not finite makes sums and inner products so; elsewhere a mask or a rank may
    # hide it.
    cohort = checked(cohort, dense_later=all(g.linear or g.needs_gram for g in parts))
    merged: dict[str, Delta] = {}
    for group in parts:
        alike = with_importance(cohort.only(group.modules), vectors, group.method)
        alike = placed(alike, group.method, device)
        merged.update(_merge_group(alike, group, budget_bytes))
    return TaskVector(merged, cohort.base_hash)


def _merge_group(cohort: Cohort, group: Group, budget_bytes: int) -> dict[str, Delta]:
    """Merged modules of one group."""
    method, config, weights_C = group.method, group.config, group.weights_C
    merged: dict[str, Delta] = {}
    if group.excluded or method.coefficients is not None:
        coefficients = group_coefficients(cohort, group, budget_bytes)
        for module, deltas in cohort.deltas.items():
            factors = [c * group.scale for c in coefficients[module]]
            total = weighted_sum(deltas, factors)
            if group.linear:
                check_dense(cohort, module, factors, total)
            merged[module] = total
    elif method.matrices is not None:
        for module, delta in method.merge_modules(cohort.deltas, weights_C, config).items():
            merged[module] = scaled(delta, group.scale)
    elif method.factors:
        for module, deltas in cohort.deltas.items():
            average = merge_factors(module, deltas, method, config, weights_C, cohort.names)
            merged[module] = scaled(average, group.scale)
    else:
        seen = mixture(cohort, group, budget_bytes)
        entries = EntryMerge(cohort, method, config, weights_C, budget_bytes, mixture=seen)
        for module, deltas in cohort.deltas.items():
            merged[module] = entries.dense(module, group.scale).view(deltas[0].shape)
    return merged


def group_coefficients(
    cohort: Cohort,
    group: Group,
    budget_bytes: int,
    grams: Mapping[str, Tensor] | None = None,
) -> dict[str, list[float]]:
    """c_i per contribution by module: the same in all of them unless they follow from its Gram.

    Args:
        cohort: The contributions, over the group's modules.
        group: One that is excluded, or whose method has ``coefficients``.
        budget_bytes: Memory for dense entries.
        grams: ⟨τ_i, τ_j⟩ by module [C, C] where they are known; read only where they are needed.
    """
    if group.excluded:
        return dict.fromkeys(cohort.deltas, [0.0] * len(cohort))
    method, weights_C = group.method, group.weights_C
    assert method.coefficients is not None
    if group.needs_gram and grams is None:
        grams = module_grams(cohort, budget_bytes)
    seen = mixture(cohort, group, budget_bytes, grams)
    mix_KC = seen.mix_KC
    if mix_KC is not None:
        weights_C = torch.ones(len(mix_KC), dtype=torch.float64)
    handed: dict[str, Any] = {"names": cohort.names} if method.needs_names else {}
    if method.sample is not None:
        sample_CS = sampled(cohort, method.sample(group.config), group.config, budget_bytes)
        mixed_KS = sample_CS if mix_KC is None else (mix_KC @ sample_CS.double()).float()
        handed["sample_CS"] = mixed_KS

    def decided(gram_KK: Tensor | None) -> list[float]:
        assert method.coefficients is not None
        found_K = method.coefficients(weights_C, gram_KK, group.config, **handed)
        mine_C: Tensor = found_K if mix_KC is None else found_K @ mix_KC
        return mine_C.tolist()

    if method.needs_gram and method.scope_of(group.config) == "tensor":
        assert grams is not None
        mine = {module: grams[module] for module in group.modules}
        if mix_KC is not None:
            mine = {module: mix_KC @ gram_CC @ mix_KC.T for module, gram_CC in mine.items()}
        return {module: decided(gram_KK) for module, gram_KK in mine.items()}
    return dict.fromkeys(cohort.deltas, decided(seen.gram_KK))


def weighted_sum(deltas: Sequence[Delta], coefficients: Sequence[float]) -> Held:
    """Σ c_i ΔW_i: stacked factors where all are factors, else dense in fp32.

    Args:
        deltas: One change per contribution, of one shape.
        coefficients: c_i; those that are zero are left out.
    """
    used = [(d, c) for d, c in zip(deltas, coefficients, strict=True) if c]
    parts = [
        LowRank(delta.b_mk.float() * coefficient, delta.a_kn)
        for delta, coefficient in used
        if isinstance(delta, LowRank)
    ]
    if parts and len(parts) == len(used):
        return stack(parts)
    dense = [delta.view(-1) for delta, _ in used if isinstance(delta, Tensor) and readable(delta)]
    if dense and len(dense) == len(used) and all_worthwhile(dense):
        sum_up = load(WEIGHTED_SUM, dense[0].device)
        merged_D: Tensor = sum_up(dense, [coefficient for _, coefficient in used])
        return merged_D.view(deltas[0].shape)
    device = device_of(deltas[0])
    if ternary := large_ternary([delta for delta, _ in used], device):
        sum_up = load(TERNARY_SUM, device)
        total_D: Tensor = sum_up(ternary, [coefficient for _, coefficient in used], device)
        return total_D.view(deltas[0].shape)
    if not used and isinstance(deltas[0], LowRank):
        return scaled(deltas[0], 0.0)
    total = torch.zeros(deltas[0].shape, dtype=torch.float32, device=device)
    for delta, coefficient in used:
        change = held(delta)
        if isinstance(change, LowRank):
            total.addmm_(change.b_mk.float(), change.a_kn.float(), alpha=coefficient)
        else:
            total.add_(change.float(), alpha=coefficient)
    return total


def merge_factors(
    module: str,
    deltas: Sequence[Delta],
    method: MergeMethod,
    config: MethodConfig,
    weights_C: Tensor,
    names: Sequence[str],
) -> Held:
    """A and B merged apart, for the methods that do so; dense entries as they are.

    Raises:
        ValueError: Ranks differ where the method does not pad them, or one contribution is dense
            and another is not.
    """
    merge = method.merge
    assert merge is not None

    def apart(tensors: Sequence[Tensor]) -> Tensor:
        flat_CD = torch.stack([tensor.float().flatten() for tensor in tensors])
        return merge(flat_CD, weights_C, config).view(tensors[0].shape)

    parts = [held(delta) for delta in deltas]
    dense = [part for part in parts if isinstance(part, Tensor)]
    if len(dense) == len(deltas):
        return apart(dense)
    factors = [part for part in parts if isinstance(part, LowRank)]
    if method.weigh is not None and not dense:
        norms_C = torch.tensor([part.norm() for part in factors], dtype=torch.float64)
        weights_C = method.weigh(weights_C, norms_C)
        factors = _padded(factors)
    ranks = {name: part.rank for name, part in zip(names, factors, strict=False)}
    if dense or len(set(ranks.values())) > 1:
        raise ValueError(
            f"{method.name}: module {module}: needs factors of one rank from every contribution, "
            f"got {ranks}; use mean, which merges ΔW"
        )
    return LowRank(apart([part.b_mk for part in factors]), apart([part.a_kn for part in factors]))


def _padded(parts: Sequence[LowRank]) -> list[LowRank]:
    """The same products, all of the largest inner rank: zeros below A and beside B."""
    rank = max(part.rank for part in parts)
    return [
        LowRank(
            functional.pad(part.b_mk, (0, rank - part.rank)),
            functional.pad(part.a_kn, (0, 0, 0, rank - part.rank)),
        )
        for part in parts
    ]
