"""Suspicion in a merge: who is judged, and each module merged by those who are left in it.

Shape legend: C contributions, K of them that are merged in some modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anabranch.aggregation.backdoor.config import FEWEST, SuspicionConfig
from anabranch.aggregation.backdoor.consequences import Consequences, consequences
from anabranch.aggregation.backdoor.features import module_features, trained_factors, with_floor
from anabranch.aggregation.backdoor.suspicion import Suspicion, suspect
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.gram import total_gram
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.method import MergeMethod
from anabranch.vectors.adapter import Adapter
from anabranch.vectors.task_vector import scaled


def judge(
    cohort: Cohort,
    grams: Mapping[str, Tensor],
    adapters: Sequence[Adapter],
    starts: Sequence[Adapter | None],
    config: SuspicionConfig,
) -> tuple[Suspicion, Consequences]:
    """Look at every contribution's changes beside the others'.

    Args:
        cohort: The contributions' task vectors, over this rank's modules.
        grams: ⟨τ_i, τ_j⟩ by module [C, C], of all ranks.
        adapters: The contributions.
        starts: What each started from, None for the bare base.
        config: What to look for, and what to do.

    Raises:
        ValueError: Too few contributions.
        SuspicionError: Somebody must be asked.
    """
    factors = trained_factors(adapters, starts)
    mine = {m: module_features(deltas, factors.get(m)) for m, deltas in cohort.deltas.items()}
    shared = cohort.ranks.union(mine)
    by_module = {module: shared[module] for module in sorted(shared)}
    gram_CC = total_gram(grams, len(cohort))
    norms = gram_CC.diagonal().clamp(min=0).sqrt().tolist()
    suspicion = suspect(cohort.names, with_floor(by_module, norms), gram_CC, config)
    return suspicion, consequences(suspicion, cohort.names, config)


@dataclass(frozen=True)
class Portion:
    """Some modules of a group, and who is merged in them.

    Attributes:
        group: The modules, with the weights of those who are merged.
        factors: On each contribution's change [C]; who has 0 is not merged.
    """

    group: Group
    factors: tuple[float, ...]

    @property
    def kept(self) -> list[int]:
        """Places of those who are merged [K]."""
        return [place for place, factor in enumerate(self.factors) if factor]

    @property
    def whole(self) -> bool:
        """Whether everybody is merged, as they are."""
        return all(factor == 1 for factor in self.factors)

    def cohort(self, cohort: Cohort) -> Cohort:
        """The changes that are merged, over the group's modules: taken and scaled."""
        alike = cohort.only(self.group.modules)
        if self.whole:
            return alike
        deltas = {
            module: tuple(
                parts[i] if self.factors[i] == 1 else scaled(parts[i], self.factors[i])
                for i in self.kept
            )
            for module, parts in alike.deltas.items()
        }
        return replace(alike, names=tuple(cohort.names[i] for i in self.kept), deltas=deltas)

    def grams(self, grams: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Their inner products by module [K, K]."""
        if self.whole:
            return grams
        factors_C = torch.tensor(self.factors, dtype=torch.float64)
        scales_CC, kept = factors_C[:, None] * factors_C[None, :], self.kept
        return {module: (grams[module] * scales_CC)[kept][:, kept] for module in self.group.modules}

    def spread(self, coefficients: Sequence[float]) -> list[float]:
        """Coefficients [K] of what was merged as those of all contributions [C]."""
        full = [0.0] * len(self.factors)
        for place, coefficient in zip(self.kept, coefficients, strict=True):
            full[place] = coefficient * self.factors[place]
        return full


def portions(group: Group, count: int, decided: Consequences | None) -> Iterator[Portion]:
    """A group cut by who is merged in its modules; the group itself where nobody is suspected.

    Modules that are merged by the same contributions stay a model of their own.

    Args:
        group: Modules that the recipe merges alike.
        count: Contributions, C.
        decided: What becomes of them.

    Raises:
        ValueError: The weights of those left cannot be used.
    """
    if decided is None or group.excluded:
        yield Portion(group, (1.0,) * count)
        return
    by_factors: dict[tuple[float, ...], list[str]] = {}
    for module in group.modules:
        by_factors.setdefault(decided.of(module), []).append(module)
    for factors, modules in by_factors.items():
        kept = [place for place, factor in enumerate(factors) if factor]
        weights_K = group.method.check_weights(group.weights_C[kept], len(kept))
        yield Portion(replace(group, modules=tuple(modules), weights_C=weights_K), factors)


def check_suspicion(config: SuspicionConfig, method: MergeMethod, count: int) -> None:
    """Refuse what cannot be judged or done.

    Raises:
        ValueError: Too few contributions, or changes to scale for a method that reads none.
    """
    if count < FEWEST:
        raise ValueError(
            f"suspicion: of {count} contributions none can be told from the others; "
            f"let {FEWEST} or more be merged, or leave suspicion out"
        )
    weighing = [config.action, *config.actions.values()]
    if method.factors and "weigh_down" in weighing:
        raise ValueError(
            f"suspicion: weigh_down scales changes, and {method.name} merges factors; "
            "set the action to mask_module or exclude"
        )


def check_not_judged(config: SuspicionConfig | None, what: str) -> None:
    """Refuse suspicion of what is no adapter, which would otherwise be read past.

    Raises:
        ValueError: It is asked for.
    """
    if config is not None:
        raise ValueError(
            f"suspicion: judges the factors of adapters, and these are {what}; leave it out"
        )
