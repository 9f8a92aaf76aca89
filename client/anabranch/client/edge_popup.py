"""A linear layer of which only the choice of its weights is trained (edge-popup, 1911.13299).

Shape legend: m outputs, n inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from anabranch.vectors.supermask import signed_constant, supermask


class SupermaskLinear(nn.Module):
    """y = (W ∘ mask(scores)) x, W frozen at ±σ, the mask that of the highest scores.

    Backwards, the mask counts as the scores themselves (straight through).

    Args:
        inputs: n.
        outputs: m.
        seed: Of W and of the first scores: all clients begin alike.
        name: Of the layer; layers of one seed differ by it.
        density: Share of the weights that take part.
    """

    def __init__(
        self, inputs: int, outputs: int, *, seed: int, name: str, density: float = 0.5
    ) -> None:
        super().__init__()
        self.density = density
        self.register_buffer("weight_mn", signed_constant((outputs, inputs), seed, name))
        bound = 1 / math.sqrt(inputs)
        generator = torch.Generator().manual_seed(seed)
        scores_mn = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
        self.scores_mn = nn.Parameter(scores_mn)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., n] to outputs [..., m]."""
        mask_mn = supermask(self.scores_mn, self.density).to(self.scores_mn.dtype)
        # Exactly the mask; its gradient is that of the scores.
        mask_mn = mask_mn + (self.scores_mn - self.scores_mn.detach())
        return functional.linear(x, self.get_buffer("weight_mn") * mask_mn)
