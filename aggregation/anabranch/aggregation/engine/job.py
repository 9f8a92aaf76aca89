"""How a method goes through adapters: as factors, entry by entry, or A and B apart.

Shape legend: C contributions, m rows, n columns, k inner rank, R rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from anabranch.aggregation.engine.align import balanced_factors
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.entries import EntryMerge
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.engine.mixture import mixture
from anabranch.aggregation.engine.refactor import (
    Spectrum,
    low_rank_spectrum,
    matrix_rows,
    streamed_spectrum,
)
from anabranch.aggregation.engine.rows import FP32_BYTES, fill_rows
from anabranch.aggregation.engine.stream import merge_factors, weighted_sum
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors.adapter import Adapter, LoraFactors
from anabranch.vectors.task_vector import Delta, Held, LowRank

Progress = Callable[[int, int], None]
"""Called with how many modules are done, and how many there are."""


@dataclass(frozen=True)
class AdapterMerge:
    """One merge's inputs, checked, and the four ways a method can go through them.

    Attributes:
        adapters: The contributions' adapters.
        start: What the result is added to, None for the bare base.
        starts: What each of them started from, None where that is ``start``.
        refactor: The way back to rank r.
        group: Which modules, and how they are merged.
        cohort: The contributions' task vectors against the start, over those of these modules that
            are this rank's.
        grams: ⟨τ_i, τ_j⟩ by module [C, C]: the report needs them, whatever the method.
        budget_bytes: Memory for dense entries.
        progress: Called for every module that is done.
        scaled: Whether the cohort's changes were scaled, and are not what the adapters say.
    """

    adapters: Sequence[Adapter]
    start: Adapter | None
    starts: Sequence[Adapter] | None
    refactor: Refactor
    group: Group
    cohort: Cohort
    grams: Mapping[str, Tensor]
    budget_bytes: int
    progress: Callable[[], None]
    scaled: bool = False

    @property
    def reference(self) -> Adapter:
        """Whose alpha, dtype and PEFT configuration the result takes."""
        return self.adapters[0] if self.start is None else self.start

    @cached_property
    def merged(self) -> EntryMerge:
        """The method on entries; made once, for what it gathers over the whole model."""
        group = self.group
        seen = mixture(self.cohort, group, self.budget_bytes, self.grams)
        return EntryMerge(
            self.cohort,
            group.method,
            group.config,
            group.weights_C,
            self.budget_bytes,
            mixture=seen,
        )

    @property
    def with_factors(self) -> list[str]:
        """The modules that are no parameters trained in full, in order."""
        return [module for module in self.cohort.deltas if module in self.reference.lora]

    def modules(self) -> Iterator[str]:
        """Modules with factors, in order; asking for the next one says that one is done."""
        for module in self.with_factors:
            yield module
            self.progress()

    def rank(self, module: str) -> int:
        """The rank a module goes back to."""
        inputs = self.adapters if self.start is None else (*self.adapters, self.start)
        largest = max(adapter.lora[module].rank for adapter in inputs)
        return self.refactor.rank or largest

    def kept(self) -> dict[str, LoraFactors]:
        """Factors as the start has them; without one, such that add nothing."""
        kept = {}
        for module in self.modules():
            like = self.reference.lora[module]
            nothing = torch.zeros_like(like.b_mr)
            kept[module] = like if self.start is not None else replace(like, b_mr=nothing)
        return kept

    def linear(
        self, coefficients: Mapping[str, Sequence[float]]
    ) -> tuple[dict[str, LoraFactors], dict[str, Spectrum]]:
        """Σ c_i·ΔW_i without forming any: stacked, then truncated or kept.

        Σ c_i(B_iA_i − B_sA_s) + B_sA_s is gathered as Σ c_iB_iA_i + (1 − Σc_i)B_sA_s: half the
        inner rank, and the start drops out of a mean. It does not where starts differ, or where
        changes were scaled.

        Args:
            coefficients: c_i by module, the recipe's scale not in them.
        """
        lora: dict[str, LoraFactors] = {}
        spectra: dict[str, Spectrum] = {}
        for module in self.modules():
            factors = [c * self.group.scale for c in coefficients[module]]
            if self.starts is None and not self.scaled:
                parts: list[Delta] = [one.lora[module].delta() for one in self.adapters]
                rest = 1 - sum(factors)
            else:
                parts, rest = list(self.cohort.deltas[module]), 1.0
            if self.start is not None and abs(rest) > 1e-12:
                parts.append(self.start.lora[module].delta())
                factors.append(rest)
            total = weighted_sum(parts, factors)
            assert isinstance(total, LowRank)
            lora[module] = self._from_product(module, total, spectra)
        return lora, spectra

    @cached_property
    def merged_matrices(self) -> dict[str, Held]:
        """The method on weight matrices, over the whole model."""
        modules: dict[str, Sequence[Delta]] = dict(self.cohort.deltas)
        if self.group.method.factors:
            for module in self.with_factors:
                modules[module] = [adapter.lora[module].delta() for adapter in self.adapters]
        group = self.group
        return group.method.merge_modules(modules, group.weights_C, group.config, self.cohort.ranks)

    def matrices(self) -> tuple[dict[str, LoraFactors], dict[str, Spectrum]]:
        """Merged factors, the start's beside them.

        Where the method merged whole adapters and not task vectors, start + scale·(merged − start).
        """
        scale = self.group.scale
        rest = 1 - scale if self.group.method.factors else 1.0
        # Here and not at the first module: a rank that has none is asked for its norms, too.
        merged = self.merged_matrices
        lora: dict[str, LoraFactors] = {}
        spectra: dict[str, Spectrum] = {}
        for module in self.modules():
            parts, factors = [merged[module]], [scale]
            if self.start is not None and bool(self.start.lora[module].b_mr.any()):
                parts.append(self.start.lora[module].delta())
                factors.append(rest)
            total = weighted_sum(parts, factors)
            assert isinstance(total, LowRank)
            lora[module] = self._from_product(module, total, spectra)
        return lora, spectra

    def entries(self) -> tuple[dict[str, LoraFactors], dict[str, Spectrum]]:
        """Merged entries, streamed into a randomised SVD one module at a time."""
        lora, spectra = {}, {}
        # Here and not at the first module: a rank that has none counts with the others, too.
        merged = self.merged
        for module in self.modules():
            onto = None if self.start is None else self.start.lora[module].delta()
            m, n = self.cohort.deltas[module][0].shape
            if m * n * FP32_BYTES <= self.budget_bytes // 2:
                source = matrix_rows(merged.dense(module, self.group.scale, onto))
            else:
                source = _Again(merged, module, self.group.scale, onto)
            device = self.reference.lora[module].a_rn.device
            spectra[module] = streamed_spectrum(source, (m, n), self.rank(module), module, device)
            lora[module] = self._refactored(module, spectra[module])
        return lora, spectra

    def factors(self) -> dict[str, LoraFactors]:
        """A and B merged apart: start + scale·(merged − start) for each of the two."""
        scale = self.group.scale
        lora = {}
        for module in self.modules():
            mine = [adapter.lora[module] for adapter in self.adapters]
            like = self.reference.lora[module]
            if self.group.method.weigh is not None and self.start is None:
                like = max(mine, key=lambda factors: factors.rank)
            self._check_alike(module, like)
            merged = merge_factors(
                module,
                [LowRank(factors.b_mr, factors.a_rn) for factors in mine],
                self.group.method,
                self.group.config,
                self.group.weights_C,
                self.cohort.names,
            )
            assert isinstance(merged, LowRank)
            # Directions that nobody has are the start's: zeros on both sides would stay zero.
            rank = merged.rank
            b_mr = torch.cat([merged.b_mk, like.b_mr[:, rank:].float()], dim=1)
            a_rn = torch.cat([merged.a_kn, like.a_rn[rank:].float()])
            if self.start is None:
                b_mr = b_mr * scale
            else:
                b_mr = torch.lerp(like.b_mr.float(), b_mr, scale)
                a_rn = torch.lerp(like.a_rn.float(), a_rn, scale)
            lora[module] = LoraFactors(
                a_rn.to(like.a_rn.dtype), b_mr.to(like.b_mr.dtype), like.alpha, like.rslora
            )
        return lora

    def _check_alike(self, module: str, like: LoraFactors) -> None:
        """Entries of A and of B compare at one scaling only, and at one rank if none is padded."""
        wanted = self.refactor.rank
        problem = None
        if wanted not in (None, like.rank):
            problem = f"keeps rank {like.rank} and cannot go to refactor.rank {wanted}"
        whose = self.cohort.names[0] if self.start is None else "the start"
        for name, adapter in zip(self.cohort.names, self.adapters, strict=True):
            factors = adapter.lora[module]
            padded = self.group.method.weigh is not None and factors.rank < like.rank
            if factors.rank != like.rank and not padded:
                problem = f"{name} has rank {factors.rank}, {whose} has rank {like.rank}"
            elif not math.isclose(factors.scaling, like.scaling, rel_tol=1e-9):
                problem = f"{name} scales by {factors.scaling}, {whose} by {like.scaling}"
        if problem is not None:
            raise ValueError(
                f"{self.group.method.name}: module {module}: {problem}; use mean, which merges ΔW"
            )

    def dense(self, coefficients: Mapping[str, Sequence[float]] | None) -> dict[str, Tensor]:
        """Parameters trained in full: start + scale·merged."""
        if self.start is None:
            return {}
        scale = self.group.scale
        merged = {}
        for name in self.cohort.deltas:
            if name not in self.start.dense:
                continue
            before = self.start.dense[name]
            deltas = self.cohort.deltas[name]
            if coefficients is not None:
                change = weighted_sum(deltas, coefficients[name])
            elif self.group.method.matrices is not None:
                change = self.merged_matrices[name]
            elif self.group.method.factors:
                change = merge_factors(
                    name,
                    deltas,
                    self.group.method,
                    self.group.config,
                    self.group.weights_C,
                    self.cohort.names,
                )
            else:
                change = self.merged.dense(name).view(before.shape)
            assert isinstance(change, Tensor)
            merged[name] = before.float().add(change, alpha=scale).to(before.dtype)
        return merged

    def _from_product(
        self, module: str, total: LowRank, spectra: dict[str, Spectrum]
    ) -> LoraFactors:
        """A product as it is, or brought back to rank r and its spectrum noted."""
        if self.refactor.kind == "stack":
            return _as_factors(total, self.reference.lora[module])
        spectra[module] = low_rank_spectrum(total, self.rank(module))
        return self._refactored(module, spectra[module])

    def _refactored(self, module: str, spectrum: Spectrum) -> LoraFactors:
        return balanced_factors(
            spectrum,
            self.rank(module),
            self.reference.lora[module],
            name=module,
            start=None if self.start is None else self.start.lora[module],
            align=self.refactor.align,
        )


@dataclass(frozen=True)
class _Again:
    """A merged module too large to keep, formed afresh on every read."""

    merge: EntryMerge
    module: str
    scale: float
    onto: LowRank | None

    def __call__(self) -> Iterator[tuple[int, Tensor]]:
        for start, rows_Rn in self.merge.rows(self.module):
            total_Rn = torch.zeros_like(rows_Rn)
            if self.onto is not None:
                fill_rows(self.onto, start, total_Rn)
            yield start, total_Rn.add_(rows_Rn, alpha=self.scale)


def _as_factors(delta: LowRank, like: LoraFactors) -> LoraFactors:
    """A product as factors of its inner rank, exact: no truncation, no change of basis."""
    return LoraFactors(
        delta.a_kn.to(like.a_rn.dtype),
        (delta.b_mk / like.scaling).to(like.b_mr.dtype),
        like.alpha_at(delta.rank),
        like.rslora,
    )
