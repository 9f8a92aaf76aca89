"""The Gaussian mechanism on updates: clip each, add them up, add noise (DP-FedAvg, 1710.06963).

The noise is drawn in floating point from a generator seeded by the system. Against an observer who
can tell the lowest bits of what is published apart, the promise is that of an ideal Gaussian only
up to rounding (Mironov, 2012).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def clip_factor(change: Mapping[str, Tensor], clip: float) -> float:
    """What an update is multiplied by so that its ‖·‖₂ over all tensors is at most ``clip``."""
    norm = math.hypot(
        *(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in change.values())
    )
    # A hair below one where it clips: the product is rounded.
    return 1.0 if norm <= clip else clip / norm * (1 - 1e-6)


def noise_source(seed: int | None) -> np.random.Generator:
    """Where noise is drawn from: 128 bits of the system's randomness, or a seed."""
    return np.random.Generator(np.random.PCG64(secrets.randbits(128) if seed is None else seed))


def private_mean(
    changes: Sequence[Mapping[str, Tensor]],
    clip: float,
    multiplier: float,
    divisor: int,
    noise: np.random.Generator,
) -> dict[str, Tensor]:
    """(Σ clipped change + N(0, (multiplier·clip)²)) / divisor, entry by entry.

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
    mean = {}
    for name in sorted(changes[0]):
        total = torch.from_numpy(
            noise.normal(0.0, multiplier * clip, tuple(changes[0][name].shape))
        ).reshape(changes[0][name].shape)
        for factor, change in zip(factors, changes, strict=True):
            total += factor * change[name].double()
        mean[name] = (total / divisor).float()
    return mean
