"""Supermasks: which entries of frozen random weights take part (edge-popup, 1911.13299).

Nothing but a score per entry is trained; the entries of the highest scores are the network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.vectors.counter import uniform


def supermask(scores: Tensor, density: float) -> Tensor:
    """True for the share of entries with the highest scores, by their sign.

    The code published with FRL (Mozaffari et al., USENIX Security 2023) takes the highest |score|,
    while its clients vote on signed scores: a vote that turns all ranks round then leaves the mask
    nearly as it was. By signed scores it changes what ranks say it should.

    Args:
        scores: Of any shape.
        density: Share in (0, 1]: ⌊density·entries⌋ are true, at least one. Of equal scores, those
            that stand later.

    Returns:
        Boolean, of the scores' shape.
    """
    count = max(1, int(density * scores.numel()))
    order_D = scores.detach().flatten().sort(stable=True).indices
    mask_D = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask_D[order_D[len(order_D) - count :]] = True
    return mask_D.view(scores.shape)


def signed_constant(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """Frozen weights +σ and −σ, σ = √(2 / fan-in), each with equal chance; fp32.

    Args:
        shape: Outputs, inputs, and what else there is.
        seed: Everybody draws the same from it.
        name: Of the weights: others of the seed differ.
    """
    entries = torch.Size(shape).numel()
    size = (2 * shape[0] / max(1, entries)) ** 0.5
    draws_D = uniform(entries, (seed, name, 0))
    return torch.where(draws_D < 0.5, -size, size).float().view(shape)
