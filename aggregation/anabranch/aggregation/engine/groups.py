"""Modules that are merged alike, each set of them a model of its own.

Everything that merges goes through ``groups``: a recipe without rules and gradients is one group.

Shape legend: C contributions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.preset import spelled_out
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.registry import resolve, resolve_pre
from anabranch.aggregation.robust.pre import Step
from anabranch.aggregation.rules import settings_by_module


@dataclass(frozen=True)
class Group:
    """Some modules and how they are merged.

    Attributes:
        modules: Their names, sorted.
        method: The merge method.
        config: Its parameters.
        weights_C: Checked weights [C].
        scale: Factor on the merged task vector.
        excluded: Whether they stay as they were: the merged task vector is zero.
        pre: Steps before the method.
    """

    modules: tuple[str, ...]
    method: MergeMethod
    config: MethodConfig
    weights_C: Tensor  # noqa: N815
    scale: float
    excluded: bool
    pre: tuple[Step, ...] = ()

    @property
    def needs_gram(self) -> bool:
        """Whether inner products of the contributions are read."""
        return not self.excluded and (bool(self.pre) or self.method.needs_gram)

    @property
    def linear(self) -> bool:
        """Whether the result is Σ c_i·ΔW_i with coefficients that follow from the weights alone."""
        reads = self.needs_gram or self.method.sample is not None
        return self.excluded or (self.method.coefficients is not None and not reads)


def groups(recipe: Recipe, modules: Iterable[str], count: int) -> tuple[Group, ...]:
    """What the recipe says of each module.

    Args:
        recipe: The recipe.
        modules: Names of all that is merged.
        count: How many contributions there are, C.

    Raises:
        ValueError: A rule that no module matches, or parameters or weights that cannot be used, in
            one line that names the key and, where they differ by module, one such.
    """
    everything = sorted(modules)
    found = []
    for settings, names in settings_by_module(recipe, everything):
        plain = recipe.model_copy(update={"params": settings.params})
        weights = (1.0,) * count if settings.weights is None else settings.weights
        try:
            plain = spelled_out(plain, count)
            method, config = resolve(plain)
            pre = resolve_pre(plain, method)
            if pre and any(weight != 1 for weight in weights):
                raise ValueError(
                    "pre: mixtures count each contribution once; leave weights out, or pre"
                )
            weights_C = torch.tensor(weights, dtype=torch.float64)
            if not settings.excluded:
                weights_C = method.check_weights(weights_C, count)
        except ValueError as error:
            if len(names) == len(everything):
                raise
            raise ValueError(f"{error} (module {names[0]})") from error
        found.append(
            Group(names, method, config, weights_C, settings.scale, settings.excluded, pre)
        )
    return tuple(found)
