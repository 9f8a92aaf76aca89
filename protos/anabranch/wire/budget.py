"""A density per tensor from a number of bytes: where an entry more lowers the squared error most.

What a tensor costs and what it leaves out are tabled over a grid of densities. At the best choice
all tensors gain the same by one byte more (Everett, 1963), so one multiplier is searched for.

Shape legend: n entries of a tensor, t tensors, d densities of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.wire.config import CodecConfig

Array = NDArray[Any]

_GRID = np.geomspace(5e-4, 1, 96)
"""Densities that are tried, 8% apart."""

_CUTS = 16
"""Shares of the kept entries at which two magnitudes are tried to be parted."""

_TRIES = 5
_MOST_TRIES = 20
"""Where none of the first ones fits."""
_CLOSE = 0.98
"""Share of the budget that is enough."""


class HasBlob(Protocol):
    """A message."""

    @property
    def blob(self) -> bytes:
        """All of it."""
        ...


Message = TypeVar("Message", bound=HasBlob)


def within(
    budget_bytes: int,
    tensors: Mapping[str, Tensor],
    codec: CodecConfig,
    encode: Callable[[Mapping[str, float]], Message],
) -> Message:
    """The message of least squared error that is not larger than a budget.

    Args:
        budget_bytes: Most bytes of the whole message.
        tensors: What is to be encoded, by name.
        codec: Says how many magnitudes a kept entry may have.
        encode: Makes the message at these densities.

    Raises:
        ValueError: The budget is too small for a single entry of each tensor.
    """
    tables = {name: _table(tensor, codec) for name, tensor in tensors.items()}
    fewest, most = _choose(tables, 0.0), _choose(tables, math.inf)
    aim, size = float(budget_bytes), 0
    best: Message | None = None
    before: dict[str, float] | None = None
    for attempt in range(_MOST_TRIES):
        densities = _choose(tables, 8 * aim)
        # Densities are of a grid: where a step of the aim leaves them, it has to be a longer one.
        while densities == before != (fewest if size > budget_bytes else most):
            aim *= 0.98 if size > budget_bytes else 1.02
            densities = _choose(tables, 8 * aim)
        if densities == before or (best is not None and attempt >= _TRIES):
            break
        message, before = encode(densities), densities
        size = len(message.blob)
        if size <= budget_bytes and (best is None or size > len(best.blob)):
            best = message
        if best is not None and len(best.blob) >= _CLOSE * budget_bytes:
            return best
        # The manifest's share is not known before it is written.
        aim = max(0.0, aim + (budget_bytes - size) * (1.0 if size > budget_bytes else 0.9))
    if best is None:
        least = encode(_choose(tables, 0.0))
        if len(least.blob) > budget_bytes:
            raise ValueError(
                f"budget is {codec.budget}, but one entry of each of the {len(tensors)} tensors "
                f"takes {len(least.blob)} bytes; raise the budget"
            )
        best = least
    return best


def _choose(tables: Mapping[str, tuple[Array, Array, Array]], bits: float) -> dict[str, float]:
    """Densities by name whose total costs at most so many bits, or the smallest there are."""
    names = list(tables)
    densities_td, costs_td, errors_td = (
        np.stack([tables[name][part] for name in names]) for part in range(3)
    )
    rows = np.arange(len(names))

    def at(multiplier: float) -> Array:
        found: Array = np.argmin(errors_td + multiplier * costs_td, axis=1)
        return found

    # An error falls by no more than itself for a bit, and by no less than nothing.
    low, high = 0.0, float(errors_td.max()) + 1e-300
    if costs_td[rows, at(low)].sum() <= bits:
        high = low
    for _ in range(60):
        middle = np.sqrt(low * high) if low else high / 1024
        if costs_td[rows, at(middle)].sum() <= bits:
            high = middle
        else:
            low = middle
    chosen = at(high)
    return {name: float(densities_td[row, chosen[row]]) for row, name in enumerate(names)}


def _table(tensor: Tensor, codec: CodecConfig) -> tuple[Array, Array, Array]:
    """Densities [d] of a tensor, what each costs in bits, and the squared error it leaves."""
    entries_n = tensor.detach().to("cpu", torch.float32).reshape(-1).numpy()
    count = max(1, entries_n.size)
    kept_d = np.unique(np.maximum(1, np.round(_GRID * count)).astype(np.int64))
    kept_d = np.pad(kept_d, (_GRID.size - kept_d.size, 0), mode="edge")
    density_d = kept_d / count
    values_d = kept_d * (2.0 if codec.name == "two-bit" else 1.0)
    costs_d = count * _entropy(density_d) + values_d
    descending_n = -np.sort(-np.abs(entries_n).astype(np.float64))
    if not descending_n.size:
        return density_d, costs_d, np.zeros(_GRID.size)
    sums_n = np.cumsum(descending_n)
    explained_d = sums_n[kept_d - 1] ** 2 / kept_d
    if codec.name == "two-bit":
        for share in np.arange(1, _CUTS) / _CUTS:
            cut_d = np.maximum(1, np.round(share * kept_d).astype(np.int64))
            upper_d, rest_d = sums_n[cut_d - 1], kept_d - cut_d
            lower_d = (sums_n[kept_d - 1] - upper_d) ** 2 / np.maximum(rest_d, 1)
            explained_d = np.maximum(explained_d, upper_d**2 / cut_d + lower_d)
    errors_d = float(np.square(descending_n).sum()) - explained_d
    return density_d, costs_d, errors_d


def _entropy(share: Array) -> Array:
    """Bits of a coin that falls on one side with this chance."""
    inside = np.clip(share, 1e-12, 1 - 1e-12)
    bits: Array = -inside * np.log2(inside) - (1 - inside) * np.log2(1 - inside)
    return bits
