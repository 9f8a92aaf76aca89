"""The ways methods go through stored task vectors: each gives merged rows, a stretch at a time.

Shape legend: C contributions, R rows of a chunk, n columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from anabranch.aggregation.chunk import PIECE, matrix_shape
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.entries import EntryMerge
from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.engine.mixture import mixture
from anabranch.aggregation.engine.rows import FP32_BYTES, ModuleRows
from anabranch.aggregation.engine.stream import group_coefficients
from anabranch.aggregation.engine.whole_module import WholeModule
from anabranch.aggregation.method import MergeMethod, MethodConfig, combine
from anabranch.vectors.task_vector import held, norm

_DECOMPOSITIONS = 32
"""What the fp64 decompositions of a matrix take, in fp32 copies of it: 24 at most were measured."""


class MergedRows(Protocol):
    """A merge that is ready to give the rows of any module."""

    def rows(self, module: str) -> Iterator[tuple[int, Tensor]]:
        """Merged rows, first to last: index of the first, and entries [R, n] in fp32."""
        ...


def merged_rows(
    cohort: Cohort, group: Group, budget_bytes: int, *, alone: bool = True
) -> MergedRows:
    """A group's method on its modules; what it gathers over all of them is gathered here.

    Args:
        cohort: The contributions, over the group's modules.
        group: How they are merged.
        budget_bytes: Memory for entries.
        alone: Whether no other group is gone through meanwhile, whose entries are held too.
    """
    method, config, weights_C = group.method, group.config, group.weights_C
    if group.excluded:
        return _Nothing(cohort)
    if method.coefficients is not None:
        return _Combined(cohort, group_coefficients(cohort, group, budget_bytes), budget_bytes)
    if method.matrices is not None:
        matrices = _Matrices(cohort, method, config, weights_C)
        return replace(matrices, factor=matrices.to_mean_norm()) if method.mean_norm else matrices
    seen = mixture(cohort, group, budget_bytes)
    return EntryMerge(
        cohort, method, config, weights_C, budget_bytes, keep_model=alone, mixture=seen
    )


def check_budget(cohort: Cohort, method: MergeMethod, budget_bytes: int) -> None:
    """Refuse a budget that is too small for a module, before the first one is read.

    Raises:
        ValueError: It is; names the module and what would do.
    """
    for module in cohort.deltas:
        if method.whole_tensors:
            WholeModule(cohort, module, budget_bytes)
        elif method.matrices is None:
            ModuleRows(cohort, module, budget_bytes, whole_vectors=method.whole_vectors)
        elif (needed := matrix_bytes(cohort, module, method)) > budget_bytes:
            raise ValueError(
                f"budget_bytes: {cohort.ranks.budget_line(budget_bytes)} cannot hold {module} of "
                f"{len(cohort)} contributions as whole matrices, which {method.name} takes; "
                f"allow at least {needed * cohort.ranks.local_count}"
            )


def matrix_bytes(cohort: Cohort, module: str, method: MergeMethod) -> int:
    """What merging one module by ``matrices`` holds at most."""
    shape = cohort.deltas[module][0].shape
    copies = method.matrix_copies * len(cohort)
    copies += _DECOMPOSITIONS if len(shape) == 2 else 1
    return shape.numel() * FP32_BYTES * copies


@dataclass(frozen=True)
class _Nothing:
    """Zeros, for modules that stay as the base has them; nothing is read."""

    cohort: Cohort

    def rows(self, module: str) -> Iterator[tuple[int, Tensor]]:
        rows, columns = matrix_shape(self.cohort.deltas[module][0].shape)
        step = max(1, PIECE // max(1, columns))
        for start in range(0, rows, step):
            yield start, torch.zeros(min(step, rows - start), columns)


@dataclass(frozen=True)
class _Combined:
    """Σ c_i·τ_i, a chunk of rows at a time."""

    cohort: Cohort
    coefficients: Mapping[str, Sequence[float]]
    budget_bytes: int

    def rows(self, module: str) -> Iterator[tuple[int, Tensor]]:
        coefficients_C = torch.tensor(self.coefficients[module], dtype=torch.float64)
        for chunk in ModuleRows(self.cohort, module, self.budget_bytes):
            merged_D = combine(chunk.deltas_CD, coefficients_C)
            yield chunk.start, merged_D.view(-1, chunk.columns)


@dataclass(frozen=True)
class _Matrices:
    """A method on matrices, a module at a time."""

    cohort: Cohort
    method: MergeMethod
    config: MethodConfig
    weights_C: Tensor  # noqa: N815
    factor: float = 1.0

    def rows(self, module: str) -> Iterator[tuple[int, Tensor]]:
        merged = self._merge(module) * self.factor
        yield 0, merged.view(matrix_shape(merged.shape))

    def to_mean_norm(self) -> float:
        """The factor to the mean norm; every module is merged once to know it."""
        norms = {module: norm(self._merge(module)) for module in self.cohort.deltas}
        return self.method.norm_factor(self.cohort.deltas, self.weights_C, norms, self.cohort.ranks)

    def _merge(self, module: str) -> Tensor:
        merged = held(
            self.method.merge_matrix(self.cohort.deltas[module], self.weights_C, self.config)
        )
        return merged if isinstance(merged, Tensor) else merged.dense()
