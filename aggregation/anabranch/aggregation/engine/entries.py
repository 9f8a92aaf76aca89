"""Methods that decide entry by entry: statistics in first passes, merged entries in the last.

Shape legend: C contributions, R rows of a chunk, n columns, D = R·n entries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anabranch.aggregation.chunk import Chunk, matrix_shape
from anabranch.aggregation.engine.cohort import Cohort
from anabranch.aggregation.engine.importance import normalised_cohort
from anabranch.aggregation.engine.mixture import Mixture
from anabranch.aggregation.engine.rows import (
    FP32_BYTES,
    ModuleRows,
    device_of,
    fill_rows,
    large_ternary,
    merged_on,
)
from anabranch.aggregation.engine.whole_module import WholeModule
from anabranch.aggregation.kernels.rows import MIXTURES, has_kernel, load
from anabranch.aggregation.method import MergeMethod, MethodConfig, combine
from anabranch.aggregation.ranks import ALONE, Ranks
from anabranch.aggregation.statistics import Found, gather_statistics
from anabranch.vectors.task_vector import Delta


class EntryMerge:
    """A method that works on entries, applied to one cohort.

    Args:
        cohort: The contributions.
        method: One with ``merge``, not about factors.
        config: Its parameters.
        weights_C: Checked weights [C].
        budget_bytes: Memory for dense entries.
        keep_model: Whether what the statistics of a whole model read may be kept for the merge.
        mixture: What the method sees in place of the contributions.
    """

    def __init__(
        self,
        cohort: Cohort,
        method: MergeMethod,
        config: MethodConfig,
        weights_C: Tensor,
        budget_bytes: int,
        keep_model: bool = True,
        mixture: Mixture = Mixture(),  # noqa: B008
    ) -> None:
        if method.needs_importance:
            cohort = normalised_cohort(cohort, method.normalise_of(config))
        self.cohort = cohort
        self.method = method
        self.config = config
        # Mixtures count alike.
        mix_KC = mixture.mix_KC
        self.weights_C = weights_C if mix_KC is None else torch.ones(len(mix_KC)).double()
        self._mix_KC = mix_KC
        self._gram: Found = {"gram_CC": mixture.gram_KK} if mixture.gram_KK is not None else {}
        self.budget_bytes = budget_bytes
        self._found: dict[str, Found] = {}
        self._sources: dict[str, ModuleRows] = {}
        if self.method.statistics and self.method.scope_of(config) == "model":
            bytes_held = self.cohort.entries() * (self.cohort.held_per_entry + 1) * FP32_BYTES
            keep = keep_model and bytes_held <= self.budget_bytes // 2
            sources = {m: self._source(m, keep) for m in self.cohort.deltas}
            found = self._gather(list(sources.values()), cohort.ranks)
            self._found = dict.fromkeys(sources, found)
            self._sources = sources if keep else {}

    def rows(self, module: str) -> Iterator[tuple[int, Tensor]]:
        """Merged rows of a module, first to last: index of the first, and entries [R, n] in fp32.

        They lie where the first contribution does, wherever they were merged.
        Calling it again does the work again, except for the statistics.
        """
        home = device_of(self.cohort.deltas[module][0])
        if (whole_mn := self._from_ternary(module)) is not None:
            yield 0, whole_mn.to(home)
            return
        if self.method.whole_tensors:
            assert self.method.merge is not None
            parts = WholeModule(self.cohort, module, self.budget_bytes, self._mix_KC)
            merged_D = self.method.merge(parts, self.weights_C, self.config)
            yield 0, merged_D.view(matrix_shape(self.cohort.deltas[module][0].shape)).to(home)
            return
        gathers = bool(self.method.statistics) and module not in self._found
        source = self._sources.get(module)
        if source is None:
            source = self._source(module, keep=gathers)
        if gathers:
            self._found[module] = self._gather([source])
        found = self._found.get(module, {})
        for chunk in _mixed(source, self._mix_KC):
            merged_D = self.method.merge_chunk(
                chunk, self.weights_C, self.config, {**found, **self._gram}
            )
            yield chunk.start, merged_D.view(-1, chunk.columns).to(home)

    def dense(self, module: str, scale: float = 1.0, onto: Delta | None = None) -> Tensor:
        """The whole merged module [m, n] in fp32, times ``scale``, added to ``onto``."""
        first = self.cohort.deltas[module][0]
        shape = matrix_shape(first.shape, self.method.whole_vectors)
        total_mn = torch.zeros(shape, dtype=torch.float32, device=device_of(first))
        for start, rows_Rn in self.rows(module):
            view_Rn = total_mn[start : start + len(rows_Rn)]
            if onto is not None:
                fill_rows(onto, start, view_Rn)
            view_Rn.add_(rows_Rn, alpha=scale)
        return total_mn

    def _from_ternary(self, module: str) -> Tensor | None:
        """A merged module [m, n] from sparse task vectors as they are, None where it cannot be."""
        if self.method.ternary is None or module in self._found or self._mix_KC is not None:
            return None
        deltas = self.cohort.deltas[module]
        device = merged_on(self.cohort, module)
        updates = large_ternary(deltas, device)
        if not updates or not has_kernel(self.method.ternary, device):
            return None
        kernel = load(self.method.ternary, device)
        merged_D: Tensor = kernel(updates, self.weights_C, self.config, device)
        return merged_D.view(matrix_shape(deltas[0].shape, self.method.whole_vectors))

    def _source(self, module: str, keep: bool) -> ModuleRows:
        return ModuleRows(
            self.cohort,
            module,
            self.budget_bytes,
            keep,
            self.method.whole_vectors,
            fused=has_kernel(self.method.kernel, merged_on(self.cohort, module)),
            in_place=self._mix_KC is None,
        )

    def _gather(self, sources: Sequence[ModuleRows], ranks: Ranks = ALONE) -> Found:
        entries = sum(source.rows * source.columns for source in sources)
        return gather_statistics(
            self.method.statistics,
            _Chunks(sources, self._mix_KC),
            entries,
            self.weights_C,
            self.config,
            ranks,
        )


@dataclass(frozen=True)
class _Chunks:
    """The chunks of several sources, one after the other, as often as asked."""

    sources: Sequence[ModuleRows]
    mix_KC: Tensor | None  # noqa: N815

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __iter__(self) -> Iterator[Chunk]:
        return _mixed((chunk for source in self.sources for chunk in source), self.mix_KC)


def _mixed(chunks: Iterable[Chunk], mix_KC: Tensor | None) -> Iterator[Chunk]:
    """The chunks of mixtures: Σ_c mix[k, c]·τ_c, added up in fp32 in the order of contributions."""
    for chunk in chunks:
        if mix_KC is None:
            yield chunk
            continue
        if chunk.fused and has_kernel(MIXTURES, chunk.rows[0].device):
            mixed_KD: Tensor = load(MIXTURES, chunk.rows[0].device)(chunk.rows, mix_KC)
        else:
            mixed_KD = torch.stack([combine(chunk.deltas_CD, mix_C) for mix_C in mix_KC])
        yield replace(chunk, rows=mixed_KD)
