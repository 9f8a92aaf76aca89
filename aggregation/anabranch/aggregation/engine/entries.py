"""Methods that decide entry by entry: statistics in a first pass, merged entries in a second.

Shape legend: C contributions, R rows of a chunk, n columns, D = R·n entries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.rows import (
    FP32_BYTES,
    Chunk,
    ModuleRows,
    device_of,
    fill_rows,
    matrix_shape,
)
from anabranch.aggregation.magnitude import kept, stream_thresholds, tensor_thresholds
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.vectors.counter import bernoulli
from anabranch.vectors.task_vector import Delta

_DRAW = 1 << 20
"""Entries of a mask drawn at once: the 64-bit words of a draw outweigh the mask they leave."""


class EntryMerge:
    """A method that works on entries, applied to one cohort.

    Args:
        cohort: The contributions.
        method: One with ``merge``, not about factors.
        config: Its parameters.
        weights_C: Checked weights [C].
        budget_bytes: Memory for dense entries.
    """

    def __init__(
        self,
        cohort: Cohort,
        method: MergeMethod,
        config: MethodConfig,
        weights_C: Tensor,
        budget_bytes: int,
    ) -> None:
        self.cohort = cohort
        self.method = method
        self.config = config
        self.weights_C = weights_C
        self.budget_bytes = budget_bytes
        self._model_thresholds_C: Tensor | None = None
        self._thresholds: dict[str, Tensor] = {}
        self._sources: dict[str, ModuleRows] = {}
        if "thresholds_C" in self.method.statistics and self._scope() == "model":
            bytes_held = self.cohort.entries() * (len(self.cohort) + 1) * FP32_BYTES
            keep = bytes_held <= self.budget_bytes // 2
            sources = {m: self._source(m, keep) for m in self.cohort.deltas}
            count = kept(self._density(), self.cohort.entries())
            self._model_thresholds_C = stream_thresholds(_Entries(list(sources.values())), count)
            self._sources = sources if keep else {}

    def rows(self, module: str) -> Iterator[tuple[int, Tensor]]:
        """Merged rows of a module, first to last: index of the first, and entries [R, n] in fp32.

        Calling it again does the work again, except for the statistics.
        """
        assert self.method.merge is not None
        needs_pass = self._needs_thresholds(module)
        source = self._sources.get(module) or self._source(module, keep=needs_pass)
        if needs_pass:
            count = kept(self._density(), source.rows * source.columns)
            if source.step >= source.rows:
                (whole,) = source
                self._thresholds[module] = tensor_thresholds(whole.deltas_CD, count)
            else:
                self._thresholds[module] = stream_thresholds(_Entries([source]), count)
        for chunk in source:
            merged_D = self.method.merge(
                chunk.deltas_CD, self.weights_C, self.config, **self._statistics(module, chunk)
            )
            yield chunk.start, merged_D.view(-1, chunk.columns)

    def dense(self, module: str, scale: float = 1.0, onto: Delta | None = None) -> Tensor:
        """The whole merged module [m, n] in fp32, times ``scale``, added to ``onto``."""
        first = self.cohort.deltas[module][0]
        total_mn = torch.zeros(matrix_shape(first), dtype=torch.float32, device=device_of(first))
        for start, rows_Rn in self.rows(module):
            view_Rn = total_mn[start : start + len(rows_Rn)]
            if onto is not None:
                fill_rows(onto, start, view_Rn)
            view_Rn.add_(rows_Rn, alpha=scale)
        return total_mn

    def _source(self, module: str, keep: bool) -> ModuleRows:
        return ModuleRows(self.cohort, module, self.budget_bytes, keep)

    def _scope(self) -> str:
        return str(getattr(self.config, "scope", self.method.scope))

    def _density(self) -> float:
        density: float = getattr(self.config, "density")  # noqa: B009 (by contract, not by type)
        return density

    def _needs_thresholds(self, module: str) -> bool:
        return (
            "thresholds_C" in self.method.statistics
            and self._model_thresholds_C is None
            and module not in self._thresholds
        )

    def _statistics(self, module: str, chunk: Chunk) -> dict[str, Tensor]:
        """What the method asked for, for one chunk."""
        found: dict[str, Tensor] = {}
        if "thresholds_C" in self.method.statistics:
            whole_C = self._model_thresholds_C
            found["thresholds_C"] = self._thresholds[module] if whole_C is None else whole_C
        if "keep_CD" in self.method.statistics:
            seed = int(getattr(self.config, "seed", 0))
            count, entries = chunk.deltas_CD.shape
            position = chunk.start * chunk.columns
            device = chunk.deltas_CD.device
            keep_CD = torch.empty(count, entries, dtype=torch.bool, device=device)
            for client, keep_D in enumerate(keep_CD):
                for first in range(0, entries, _DRAW):
                    piece_D = keep_D[first : first + _DRAW]
                    stream = (seed, module, client)
                    piece_D.copy_(
                        bernoulli(self._density(), len(piece_D), stream, position + first, device)
                    )
            found["keep_CD"] = keep_CD
        return found


@dataclass(frozen=True)
class _Entries:
    """The entries of several sources, one after the other, as often as asked."""

    sources: Sequence[ModuleRows]

    def __iter__(self) -> Iterator[Tensor]:
        return (chunk.deltas_CD for source in self.sources for chunk in source)
