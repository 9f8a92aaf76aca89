"""Masks that contributions share, drawn so that they can be learned; and merged changes under them.

Shape legend: C contributions, m rows, n columns of a module, K stacked inner ranks, N inputs, C of
logits classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.vectors.task_vector import LowRank, TaskVector, held

Masks = Mapping[str, Tensor]
"""By module: what each entry of a merged change is multiplied with."""


def drawn_mask(logits_mn: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A relaxed Bernoulli draw (Maddison et al., 1611.00712), differentiable in the logits.

    Args:
        logits_mn: Log-odds that an entry stays.
        temperature: Towards 0 draws are 0 or 1.
        generator: On the CPU.

    Returns:
        Entries between 0 and 1.
    """
    uniform_mn = torch.rand(logits_mn.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    noise_mn = (uniform_mn.log() - (-uniform_mn).log1p()).to(logits_mn.device)
    return torch.sigmoid((logits_mn + noise_mn) / temperature)


def rescaled(mask_mn: Tensor) -> Tensor:
    """The mask over its mean, so that a merged change stays as large on average."""
    return mask_mn / mask_mn.mean().clamp(min=1e-6)


def entropy(logits_NC: Tensor) -> Tensor:
    """Mean entropy of predictions, in nats."""
    logs_NC = F.log_softmax(logits_NC.float(), dim=-1)
    return -(logs_NC.exp() * logs_NC).sum(-1).mean()


@dataclass(frozen=True)
class Blend:
    """Contributions' changes to be summed with coefficients, module by module.

    Attributes:
        count: C.
        products: Modules whose changes are products: stacked B [m, K], stacked A [K, n], and the
            contribution of each of the K ranks.
        entries: Modules and parameters held as entries: stacked [C, ...].
    """

    count: int
    products: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    entries: Mapping[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """Their names, sorted; row i of the coefficients is that of module i."""
        return sorted([*self.products, *self.entries])

    def shape(self, module: str) -> torch.Size:
        """The shape of a module's change."""
        if module in self.entries:
            return self.entries[module].shape[1:]
        b_mK, a_Kn, _ = self.products[module]
        return torch.Size((b_mK.shape[0], a_Kn.shape[1]))

    def total(self, module: str, coefficients_C: Tensor) -> Tensor:
        """Σ c_i·ΔW_i of one module, differentiable in the coefficients."""
        if module in self.entries:
            entries: Tensor = torch.tensordot(coefficients_C, self.entries[module], dims=1)
            return entries
        b_mK, a_Kn, owner_K = self.products[module]
        total_mn: Tensor = (b_mK * coefficients_C[owner_K]) @ a_Kn
        return total_mn

    def merged(self, coefficients_MC: Tensor, masks: Masks) -> dict[str, Tensor]:
        """All modules' changes, under masks where there are any."""
        found = {}
        for row, module in enumerate(self.modules):
            total = self.total(module, coefficients_MC[row])
            found[module] = total * masks[module] if module in masks else total
        return found


def blend(vectors: Sequence[TaskVector]) -> Blend:
    """Task vectors of the same modules as what coefficients sum up; checked by ``gather`` before.

    Args:
        vectors: One per contribution.
    """
    products, entries = {}, {}
    for module in vectors[0].names():
        parts = [held(vector.deltas[module]) for vector in vectors]
        factors = [part for part in parts if isinstance(part, LowRank)]
        if len(factors) == len(parts):
            ranks = torch.tensor([part.rank for part in factors])
            owner_K = torch.repeat_interleave(torch.arange(len(factors)), ranks)
            b_mK = torch.cat([part.b_mk.detach().float() for part in factors], dim=1)
            a_Kn = torch.cat([part.a_kn.detach().float() for part in factors])
            products[module] = (b_mK, a_Kn, owner_K.to(b_mK.device))
        else:
            dense = [part.dense() if isinstance(part, LowRank) else part for part in parts]
            entries[module] = torch.stack([one.detach().float() for one in dense])
    return Blend(len(vectors), products, entries)
