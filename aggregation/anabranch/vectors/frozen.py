"""Adapters of which the first ranks are trained and the rest is kept frozen beside them.

One adapter holds both: what is published, sent and hashed is the whole, and PEFT loads it. FLoRA
(2409.05976) and FedEx-LoRA (2410.09432) put the frozen part into the base instead: every client
would have to keep in step, and round.

Shape legend: m rows, n columns of a module's weight, r ranks that are trained, f frozen ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from anabranch.vectors.adapter import A_SUFFIX, B_SUFFIX, Adapter, LoraFactors
from anabranch.vectors.task_vector import LowRank


def split(whole: Adapter, like: Adapter) -> tuple[Adapter, dict[str, LowRank]]:
    """An adapter's trained part, of the ranks and alphas of ``like``, and its frozen part.

    Returns:
        The first ranks and all dense parameters; the others as factors per module, where there are
        any, scaling folded in.

    Raises:
        ValueError: Modules or scalings differ.
    """
    if whole.lora.keys() != like.lora.keys():
        odd = sorted(whole.lora.keys() ^ like.lora.keys())[:3]
        raise ValueError(f"the adapter has other LoRA modules than expected; they differ in {odd}")
    lora: dict[str, LoraFactors] = {}
    frozen: dict[str, LowRank] = {}
    for name, factors in whole.lora.items():
        theirs = like.lora[name]
        r = theirs.rank
        if not math.isclose(factors.scaling, theirs.scaling, rel_tol=1e-9):
            raise ValueError(
                f"module {name} scales by {factors.scaling:g}, expected {theirs.scaling:g}; "
                "use one LoRA configuration"
            )
        lora[name] = LoraFactors(factors.a_rn[:r], factors.b_mr[:, :r], theirs.alpha, theirs.rslora)
        if factors.rank > r:
            frozen[name] = LowRank(factors.b_mr[:, r:] * theirs.scaling, factors.a_rn[r:])
    return Adapter(lora, whole.dense, whole.base_hash, whole.peft), frozen


def join(trained: Adapter, frozen: Mapping[str, LowRank]) -> Adapter:
    """The whole adapter of a trained part and a frozen one: ΔW is their sum."""
    lora = dict(trained.lora)
    for name, part in frozen.items():
        factors = lora[name]
        lora[name] = LoraFactors(
            torch.cat([factors.a_rn, part.a_kn.to(factors.a_rn)]),
            torch.cat([factors.b_mr, (part.b_mk / factors.scaling).to(factors.b_mr)], dim=1),
            factors.alpha_at(factors.rank + part.rank),
            factors.rslora,
        )
    return Adapter(lora, trained.dense, trained.base_hash, trained.peft)


def whole_layout(
    trained: Adapter, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The layout of an adapter that may hold frozen ranks beside the trained ones.

    A module's ranks are taken from ``shapes`` where A and B agree on them and no more are frozen
    than a matrix m x n can have; everything else is the trained part's.

    Args:
        trained: Gives names, shapes, and the fewest ranks.
        shapes: What a message claims; not trusted.
    """
    layout = {name: tuple(tensor.shape) for name, tensor in trained.tensors().items()}
    for name, most in most_ranks(trained).items():
        a, b = name + A_SUFFIX, name + B_SUFFIX
        (r, n), (m, _) = layout[a], layout[b]
        k = shapes.get(a, (r, n))[0]
        if r <= k <= most and shapes.get(a) == (k, n) and shapes.get(b) == (m, k):
            layout[a], layout[b] = (k, n), (m, k)
    return layout


def most_ranks(trained: Adapter) -> dict[str, int]:
    """By module, the ranks of a whole adapter at most: the trained ones and min(m, n) frozen."""
    return {
        name: factors.rank + min(len(factors.b_mr), factors.a_rn.shape[1])
        for name, factors in trained.lora.items()
    }


def from_tensors(trained: Adapter, tensors: Mapping[str, Tensor]) -> Adapter:
    """A whole adapter from its flat layout, as ``whole_layout`` gives it; scalings stay.

    Raises:
        ValueError: Names differ from the trained part's.
    """
    mine = trained.tensors()
    if sorted(tensors) != sorted(mine):
        odd = sorted(set(tensors) ^ set(mine))[:3]
        raise ValueError(f"tensor names do not match the adapter's; they differ in {odd}")
    lora = {}
    for name, factors in trained.lora.items():
        a_rn, b_mr = tensors[name + A_SUFFIX], tensors[name + B_SUFFIX]
        lora[name] = LoraFactors(a_rn, b_mr, factors.alpha_at(len(a_rn)), factors.rslora)
    dense = {name: tensors[name] for name in trained.dense}
    return Adapter(lora, dense, trained.base_hash, trained.peft)
