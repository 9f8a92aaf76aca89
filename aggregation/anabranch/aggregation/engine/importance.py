"""What contributions say of the importance of their entries, once it can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.method import MergeMethod
from anabranch.vectors.importance import Over, normalised
from anabranch.vectors.task_vector import Delta, LowRank, Stored, TaskVector, held


def with_importance(cohort: Cohort, vectors: Sequence[TaskVector], method: MergeMethod) -> Cohort:
    """The cohort with each contribution's importance beside its changes, if the method reads it.

    No number is looked at.

    Args:
        cohort: The contributions.
        vectors: Their task vectors, in its order.
        method: What merges them.

    Raises:
        ValueError: A contribution ships none, or one of another shape; names it and the module.
    """
    if not method.needs_importance:
        return cohort
    importances: dict[str, tuple[Delta, ...]] = {}
    for module, deltas in cohort.deltas.items():
        parts = []
        for name, vector, delta in zip(cohort.names, vectors, deltas, strict=True):
            found = vector.importance.get(module)
            if found is None:
                of = f" of module {module}" if vector.importance else ""
                raise ValueError(
                    f"{method.name}: {name} ships no Fisher{of}; put fisher.safetensors beside its "
                    "weights (TaskVector.importance in the library), or merge by mean"
                )
            if found.shape != delta.shape:
                raise ValueError(
                    f"{method.name}: {name}: the Fisher of module {module} has shape "
                    f"{tuple(found.shape)}, the module {tuple(delta.shape)}; take it again"
                )
            parts.append(found)
        importances[module] = tuple(parts)
    return replace(cohort, importances=importances)


def normalised_cohort(cohort: Cohort, over: Over) -> Cohort:
    """The cohort with importances that are sound, and have a mean of 1 over what is asked.

    Raises:
        ValueError: Numbers that are negative or not finite; names contribution and module.
    """
    each = []
    for place, name in enumerate(cohort.names):
        mine = {module: parts[place] for module, parts in cohort.importances.items()}
        for module, importance in mine.items():
            _check(importance, name, module)
        each.append(normalised(mine, over, cohort.ranks.union))
    return replace(
        cohort,
        importances={m: tuple(mine[m] for mine in each) for m in cohort.importances},
    )


def _check(importance: Delta, name: str, module: str) -> None:
    """What is stored is looked at whenever it is read."""
    if isinstance(importance, Stored):
        return
    found = held(importance)
    largest = 1.0
    for tensor in [found.b_mk, found.a_kn] if isinstance(found, LowRank) else [found]:
        if not tensor.numel():
            continue
        low, high = (float(end) for end in torch.aminmax(tensor.detach()))
        largest = largest * high if low >= 0 else -1.0
    # A comparison that NaN fails.
    if not 0 <= largest <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"{name}: the importance of module {module} holds numbers that are negative or not "
            "finite in fp32; drop that contribution"
        )
