"""The Gaussian mechanism on updates: clip each, add them up, add noise (DP-FedAvg, 1710.06963).

Floating point would give more away than the ideal mechanism: the lowest bits of a sum and its noise
tell which sums were possible (Mironov, 2012). Therefore each clipped update is rounded to whole
steps of a grid that is fixed beforehand, and so is the noise. Whole steps add up exactly, and
x + round(n) = round(x + n) for whole x: what comes out is the ideal mechanism's answer, rounded,
and rounding an answer tells nothing new. What is left is how close a float64 draw is to an ideal
one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from anabranch.coordinator.privacy.noise import GaussianStream

STEPS = 1024
"""Steps of the grid, at least, in each entry of an update of equal entries and norm ``clip``."""


def grid_step(clip: float, entries: int) -> float:
    """The grid's step, a power of two: rounding to it moves an update by under ``clip`` / 2048."""
    return float(2.0 ** math.floor(math.log2(clip / math.sqrt(entries) / STEPS)))


def clip_factor(change: Mapping[str, Tensor], clip: float) -> float:
    """What an update is multiplied by so that, rounded to the grid, its ‖·‖₂ is at most ``clip``.

    An update that is not finite counts as zeros: 0.0.
    """
    norm = math.hypot(
        *(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in change.values())
    )
    if not math.isfinite(norm):
        return 0.0
    entries = sum(part.numel() for part in change.values())
    # Rounding may add half a step to every entry; the last factor is for float64's own rounding.
    most = (clip - grid_step(clip, entries) * math.sqrt(entries) / 2) * (1 - 1e-12)
    return 1.0 if norm <= most else most / norm


def in_steps(part: Tensor, factor: float, step: float) -> Tensor:
    """One tensor of an update, multiplied by its factor, as whole steps in float64."""
    if factor == 0.0:
        return torch.zeros_like(part, dtype=torch.float64)  # zero times infinity is none
    return (part.double() * (factor / step)).round()


def private_mean(
    changes: Sequence[Mapping[str, Tensor]],
    clip: float,
    multiplier: float,
    divisor: int,
    noise: GaussianStream,
) -> dict[str, Tensor]:
    """(Σ clipped change + N(0, (multiplier·clip)²)) / divisor, entry by entry.

    Replacing one change by zeros moves the sum by ``clip`` at most, and leaves the divisor.

    Args:
        changes: The updates, of equal names and shapes.
        clip: Largest ‖·‖₂ of an update that counts whole.
        multiplier: Standard deviation of the noise over ``clip``.
        divisor: A number fixed beforehand, not how many replied: that would depend on the clients.
        noise: Drawn from in sorted order of names.

    Returns:
        fp32 tensors by name.
    """
    factors = [clip_factor(change, clip) for change in changes]
    step = grid_step(clip, sum(part.numel() for part in changes[0].values()))
    mean = {}
    for name in sorted(changes[0]):
        shape = changes[0][name].shape
        drawn = noise.normal(shape.numel()) * (multiplier * clip / step)
        total = torch.from_numpy(np.rint(drawn)).reshape(shape)
        for factor, change in zip(factors, changes, strict=True):
            total += in_steps(change[name], factor, step)
        mean[name] = (total * (step / divisor)).float()
    return mean
