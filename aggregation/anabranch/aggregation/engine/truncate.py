"""An adapter at a lower rank, for clients that train fewer ranks than the federation has."""

from __future__ import annotations

from anabranch.aggregation.engine.align import balanced_factors
from anabranch.aggregation.engine.refactor import low_rank_spectrum
from anabranch.vectors.adapter import Adapter


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """The best approximation of an adapter at a rank, as FlexLoRA hands it out (2402.11505).

    The factors are turned towards the adapter's own leading ones. Those are aligned from round to
    round, so these are too, without memory of the round before: error feedback that a client keeps
    for its factors stays pointed the right way.

    Args:
        adapter: What to truncate; modules of that rank or less stay as they are.
        rank: Largest rank of a module afterwards.
    """
    lora = dict(adapter.lora)
    for name, factors in adapter.lora.items():
        if factors.rank > rank:
            first = factors.leading(rank)
            spectrum = low_rank_spectrum(factors.delta(), rank)
            lora[name] = balanced_factors(spectrum, rank, first, name=name, start=first)
    return Adapter(lora, adapter.dense, adapter.base_hash, adapter.peft)
