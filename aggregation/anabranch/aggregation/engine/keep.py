"""Merges of which nothing is lost: what rank r does not hold stays beside it, frozen.

mean(B·A) has rank C·r, and a client trains r. FLoRA (Wang et al., 2409.05976) freezes all of it and
has the clients begin afresh; FedEx-LoRA (Singhal et al., 2410.09432) lets them go on from mean(B)
and mean(A) and freezes the residual mean(B·A) − mean(B)·mean(A).

Shape legend: m rows, n columns of a module's weight, k inner rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from anabranch.aggregation.engine.adapters import MergeReport, merge_adapters
from anabranch.aggregation.engine.refactor import low_rank_spectrum
from anabranch.aggregation.recipe import Recipe, Refactor
from anabranch.vectors.adapter import Adapter
from anabranch.vectors.task_vector import LowRank, stack

Rest = Literal["fedex", "flora"]
"""What the clients go on training while the rest is frozen: the means of A and B, or afresh."""


@dataclass(frozen=True)
class Kept:
    """A merge in two parts, whose ΔW add up to the whole.

    Attributes:
        trained: What the clients go on training, at the start's ranks.
        frozen: What stays beside it, by module; of rank min(m, n) at most.
        report: On the merge; nothing was truncated.
    """

    trained: Adapter
    frozen: Mapping[str, LowRank]
    report: MergeReport


def merge_keeping(
    adapters: Sequence[Adapter],
    recipe: Recipe,
    rest: Rest,
    *,
    start: Adapter,
    fresh: Adapter,
    frozen: Mapping[str, LowRank],
    starts: Sequence[Adapter] | None = None,
    names: Sequence[str] | None = None,
) -> Kept:
    """The exact merge of the trained parts, as a part to train on and a part to freeze.

    Args:
        adapters: The contributions' trained parts.
        recipe: A method whose result is a sum of products.
        rest: Which part is frozen.
        start: The trained part that all of them started from.
        fresh: An adapter to begin afresh from, B zero; read for ``flora``.
        frozen: What was frozen already.
        starts: As ``merge_adapters`` has it.
        names: What to call the contributions in messages and in the report.

    Raises:
        ValueError: As ``merge_adapters``; also a method that gives no such sum, or steps before it
            with ``fedex``.
    """
    if rest == "fedex" and recipe.has_steps:
        raise ValueError(
            "fedex: trains on from plain means of A and B, which no step can go before; "
            'take flora, or leave pre out, and method "robust"'
        )
    stacked = recipe.model_copy(update={"refactor": Refactor(kind="stack")})
    exact = merge_adapters(adapters, stacked, start=start, starts=starts, names=names)
    if rest == "flora":
        trained = fresh
    else:
        means = recipe.model_copy(update={"method": "fedit", "params": {}})
        trained = merge_adapters(adapters, means, start=start, names=names).adapter
    left: dict[str, LowRank] = {}
    for module, factors in exact.adapter.lora.items():
        minus = trained.lora[module].delta()
        parts = [factors.delta(), LowRank(-minus.b_mk, minus.a_kn)]
        parts += [frozen[module]] if module in frozen else []
        left[module] = compact(stack(parts))
    lora = trained.lora
    trained = Adapter(lora, exact.adapter.dense, exact.adapter.base_hash, exact.adapter.peft)
    return Kept(trained, left, exact.report)


def compact(delta: LowRank) -> LowRank:
    """The same product in as few ranks as it has in fp32, min(m, n) at most."""
    spectrum = low_rank_spectrum(delta, min(delta.shape))
    floor = float(spectrum.s_k[:1].sum()) * torch.finfo(torch.float32).eps
    live = int((spectrum.s_k > floor).sum())
    root_k = spectrum.s_k[:live].sqrt()
    return LowRank(
        (spectrum.u_mk[:, :live] * root_k).float(), (spectrum.v_kn[:live] * root_k[:, None]).float()
    )
