"""LoRA adapters and what both ends know of one before any byte travels.

Shape legend: m rows, n columns of a module's weight, r the adapter's rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.vectors.hashing import weights_hash
from anabranch.vectors.seeding import word_seed
from anabranch.vectors.task_vector import Delta, Held, LowRank, TaskVector, stack

A_SUFFIX, B_SUFFIX = ".lora_A", ".lora_B"

Trained = Literal["both", "a", "b"]
"""Which LoRA factors a training changes; parameters trained in full change beside any of them."""


@dataclass(frozen=True)
class LoraFactors:
    """One module's adapter: ΔW = scaling · B · A.

    Attributes:
        a_rn: A [r, n].
        b_mr: B [m, r].
        alpha: LoRA alpha.
        rslora: Scale by alpha / √r (2312.03732) and not by alpha / r.
    """

    a_rn: Tensor
    b_mr: Tensor
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.a_rn.shape[0]

    @property
    def scaling(self) -> float:
        """The factor alpha / r, or alpha / √r with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def alpha_at(self, rank: int) -> float:
        """The alpha that keeps the scaling at another rank."""
        if rank == self.rank:
            return self.alpha
        return self.scaling * (math.sqrt(rank) if self.rslora else rank)

    def leading(self, rank: int) -> LoraFactors:
        """The first rows of A and columns of B, at the same scaling."""
        rank = min(rank, self.rank)
        return LoraFactors(
            self.a_rn[:rank].clone(), self.b_mr[:, :rank].clone(), self.alpha_at(rank), self.rslora
        )

    def delta(self) -> LowRank:
        """ΔW with the scaling folded into B, in fp32: half precision would round it again."""
        return LowRank(self.b_mr.float() * self.scaling, self.a_rn)


@dataclass(frozen=True)
class Adapter:
    """A whole LoRA adapter.

    Attributes:
        lora: Factors per module name, as the base calls the module.
        dense: Parameters trained in full (PEFT's ``modules_to_save``), by parameter name.
        base_hash: ``weights_hash`` of the base; None when the adapter does not say.
        peft: The PEFT configuration it came with, less what the factors already say.
        importance: How much each entry of its ΔW, or of a dense parameter, matters to who trained
            it (``vectors.importance``); empty when nobody asked.
    """

    lora: Mapping[str, LoraFactors]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    base_hash: str | None = None
    peft: Mapping[str, Any] = field(default_factory=dict)
    importance: Mapping[str, Held] = field(default_factory=dict)

    def tensors(self, trained: Trained = "both") -> dict[str, Tensor]:
        """The flat layout that is trained, hashed and sent: ``M.lora_A``, ``M.lora_B``, dense.

        Args:
            trained: The factors wanted; dense parameters are in it always.
        """
        flat: dict[str, Tensor] = {}
        for name, factors in self.lora.items():
            if trained != "b":
                flat[name + A_SUFFIX] = factors.a_rn
            if trained != "a":
                flat[name + B_SUFFIX] = factors.b_mr
        flat.update(self.dense)
        return {name: flat[name] for name in sorted(flat)}

    def leading(self, rank: int) -> Adapter:
        """The first ``rank`` rows of every A and columns of every B; dense parameters as they are.

        Of a seeded start these are the seeded start of that rank.
        """
        lora = {name: factors.leading(rank) for name, factors in self.lora.items()}
        return Adapter(lora, self.dense, self.base_hash, self.peft)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """The same adapter with other values, from the flat layout; of no known importance.

        Raises:
            ValueError: Names or shapes differ from this adapter's.
        """
        mine = self.tensors()
        if sorted(tensors) != sorted(mine):
            odd = sorted(set(tensors) ^ set(mine))[:3]
            raise ValueError(f"tensor names do not match the adapter's; they differ in {odd}")
        for name, tensor in tensors.items():
            if tensor.shape != mine[name].shape:
                raise ValueError(
                    f"tensor {name} has shape {tuple(tensor.shape)}, "
                    f"the adapter's is {tuple(mine[name].shape)}"
                )
        lora = {
            name: LoraFactors(
                tensors[name + A_SUFFIX], tensors[name + B_SUFFIX], factors.alpha, factors.rslora
            )
            for name, factors in self.lora.items()
        }
        dense = {name: tensors[name] for name in self.dense}
        return Adapter(lora, dense, self.base_hash, self.peft)

    def hash(self) -> str:
        """``weights_hash`` of the flat layout and the scalings: what ΔW depends on."""
        scalings = {
            f"{name}.scaling": torch.tensor(factors.scaling, dtype=torch.float64)
            for name, factors in self.lora.items()
        }
        return weights_hash({**self.tensors(), **scalings})


def seeded_start(adapter: Adapter, seed: int) -> Adapter:
    """The adapter every client starts from: A drawn from the seed, B zero, dense as given.

    A is Kaiming-uniform with a = √5, LoRA's own initialisation: U(−1/√n, 1/√n). Each module has a
    generator of its own, so the draw depends on the seed and the module's name alone.

    Args:
        adapter: Gives names, shapes and dense values; its A and B are ignored.
        seed: Any integer; both ends know it, so that A₀ need not travel.
    """
    tensors = adapter.tensors()
    for name, factors in adapter.lora.items():
        generator = torch.Generator().manual_seed(word_seed(seed, name))
        bound = 1 / math.sqrt(factors.a_rn.shape[1])
        start_rn = torch.empty(factors.a_rn.shape, dtype=torch.float32)
        start_rn.uniform_(-bound, bound, generator=generator)
        tensors[name + A_SUFFIX] = start_rn.to(factors.a_rn.dtype)
        tensors[name + B_SUFFIX] = torch.zeros_like(factors.b_mr)
    return adapter.with_tensors(tensors)


def task_vector(adapter: Adapter, start: Adapter | None = None) -> TaskVector:
    """What training added: B·A − B_s·A_s per module, rank at most r + r_s, and dense − dense_s.

    Args:
        adapter: The client's end of the round.
        start: The round's start; None stands for the bare base (B_s = 0).

    Raises:
        ValueError: Dense parameters without a start to subtract, or different modules.
    """
    if start is None:
        if adapter.dense:
            raise ValueError(
                f"the adapter holds weights trained in full ({', '.join(sorted(adapter.dense))}); "
                "give the values they started from"
            )
        return TaskVector(
            {name: factors.delta() for name, factors in adapter.lora.items()},
            adapter.base_hash,
            adapter.importance,
        )
    if sorted(adapter.lora) != sorted(start.lora) or sorted(adapter.dense) != sorted(start.dense):
        mine, theirs = {*adapter.lora, *adapter.dense}, {*start.lora, *start.dense}
        odd = ", ".join(sorted(mine ^ theirs)[:3])
        raise ValueError(f"adapter and start do not cover the same modules, such as {odd}")
    deltas: dict[str, Delta] = {}
    for name, factors in adapter.lora.items():
        now, before = factors.delta(), start.lora[name].delta()
        _same_shape(name, now.shape, before.shape)
        if bool(before.b_mk.any()):
            deltas[name] = stack([now, LowRank(-before.b_mk, before.a_kn)])
        else:
            deltas[name] = now
    for name, tensor in adapter.dense.items():
        _same_shape(name, tensor.shape, start.dense[name].shape)
        deltas[name] = tensor.float() - start.dense[name].float()
    return TaskVector(deltas, adapter.base_hash, adapter.importance)


def _same_shape(name: str, mine: torch.Size, theirs: torch.Size) -> None:
    if mine != theirs:
        raise ValueError(
            f"{name} has shape {tuple(mine)}, in the start it has {tuple(theirs)}; "
            "they belong to different bases"
        )
