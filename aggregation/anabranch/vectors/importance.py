"""Importance: how much each entry of a module matters to who trained it, such as its Fisher.

One number of zero or more per entry, held as a change is: all entries of a parameter trained in
full; for a LoRA module, which has far more entries than trained numbers, a column times a row
(``LowRank`` of inner rank 1).

Shape legend: m rows, n columns of a module's weight, L entries of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from anabranch.vectors.adapter import Adapter, Trained
from anabranch.vectors.task_vector import Delta, Held, LowRank, Stored

ROWS_SUFFIX, COLUMNS_SUFFIX = ".importance_rows", ".importance_columns"

Over = Literal["model", "module", "none"]
"""Over what an importance is brought to a mean of 1."""

Mean = tuple[float, int]
"""The mean of a module's importance, and over how many entries."""

_PIECE = 1 << 20
"""Entries of a stored importance held at once."""


def closest_product(rows_m: Tensor, columns_n: Tensor) -> LowRank:
    """The column times row closest to a matrix of importance, from its sums by row and by column.

    R·C / Σ has these sums, and of all products the least generalised Kullback-Leibler divergence
    from the matrix (Adafactor, 1804.04235, proposition 1).

    Args:
        rows_m: Sum of each row [m], zero or more.
        columns_n: Sum of each column [n].
    """
    root = math.sqrt(float(rows_m.sum(dtype=torch.float64))) or 1.0
    return LowRank(
        (rows_m.double() / root).float()[:, None], (columns_n.double() / root).float()[None, :]
    )


def flat_importance(importance: Mapping[str, Held]) -> dict[str, Tensor]:
    """The layout that is sent and stored.

    ``M.importance_rows`` [m] and ``M.importance_columns`` [n], or all entries under the parameter's
    own name.
    """
    flat: dict[str, Tensor] = {}
    for name in sorted(importance):
        one = importance[name]
        if isinstance(one, LowRank):
            flat[name + ROWS_SUFFIX], flat[name + COLUMNS_SUFFIX] = one.b_mk[:, 0], one.a_kn[0]
        else:
            flat[name] = one
    return flat


def from_flat_importance(flat: Mapping[str, Tensor]) -> dict[str, Held]:
    """Importance by module out of the flat layout.

    Raises:
        ValueError: A module with rows and no columns, or with sums that are no vectors.
    """
    importance: dict[str, Held] = {}
    for name, tensor in flat.items():
        module = name.removesuffix(ROWS_SUFFIX).removesuffix(COLUMNS_SUFFIX)
        if module == name:
            importance[name] = tensor
            continue
        rows, columns = flat.get(module + ROWS_SUFFIX), flat.get(module + COLUMNS_SUFFIX)
        if rows is None or columns is None or not rows.ndim == columns.ndim == 1:
            raise ValueError(
                f"{name}: module {module} needs {ROWS_SUFFIX} [m] and {COLUMNS_SUFFIX} [n]"
            )
        importance[module] = LowRank(rows[:, None], columns[None, :])
    return importance


def importance_layout(adapter: Adapter, trained: Trained = "both") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the flat layout of an adapter's importance.

    Args:
        adapter: Gives names and shapes.
        trained: A LoRA factor that is trained alone is a parameter trained in full.
    """
    full = adapter.dense if trained == "both" else adapter.tensors(trained)
    layout: dict[str, tuple[int, ...]] = {
        name: tuple(tensor.shape) for name, tensor in full.items()
    }
    if trained != "both":
        return layout
    for name, factors in adapter.lora.items():
        layout[name + ROWS_SUFFIX] = (factors.b_mr.shape[0],)
        layout[name + COLUMNS_SUFFIX] = (factors.a_rn.shape[1],)
    return {name: layout[name] for name in sorted(layout)}


def normalised(
    importance: Mapping[str, Delta],
    over: Over,
    everyone: Callable[[dict[str, Mean]], Mapping[str, Mean]] = dict,
) -> dict[str, Delta]:
    """An importance with a mean of 1 over the model or over each module; zeros stay zeros.

    What is left is where a contribution matters most to itself, and not how much it says it does.

    Args:
        importance: By module; finite, zero or more.
        over: ``none`` leaves it as it is.
        everyone: Adds the means of the model's other modules, where these are not all.
    """
    if over == "none":
        return dict(importance)
    means = {n: (_mean(importance[n]), importance[n].shape.numel()) for n in sorted(importance)}
    total = list(everyone(means).values())
    entries = sum(count for _, count in total)
    model = math.fsum(mean * count for mean, count in total) / max(1, entries)
    scaled: dict[str, Delta] = {}
    for name, (mean, _) in means.items():
        whole = model if over == "model" else mean
        scaled[name] = (
            _with_mean(importance[name], mean, mean / whole) if mean else importance[name]
        )
    return scaled


def _mean(importance: Delta) -> float:
    """Mean over the entries, in fp64; a stored one is read."""
    entries = importance.shape.numel()
    if not entries:
        return 0.0
    if isinstance(importance, LowRank):
        column_k = importance.b_mk.mean(dim=0, dtype=torch.float64)
        return float(column_k @ importance.a_kn.mean(dim=1, dtype=torch.float64))
    if isinstance(importance, Tensor):
        return float(importance.mean(dtype=torch.float64))
    sums = []
    for first in range(0, entries, _PIECE):
        piece_L = torch.empty(min(_PIECE, entries - first))
        importance.read(first, piece_L)
        sums.append(float(piece_L.sum(dtype=torch.float64)))
    return math.fsum(sums) / entries


def _with_mean(importance: Delta, mean: float, wanted: float) -> Delta:
    """An importance of this mean, above zero, brought to the one wanted.

    Factors are scaled apart and in fp64: a product may fit fp32 where one of them no longer does.
    """
    if isinstance(importance, LowRank):
        row = float(importance.a_kn.mean(dtype=torch.float64))
        b_mk = importance.b_mk.double() * (wanted * row / mean)
        return LowRank(b_mk.float(), (importance.a_kn.double() / row).float())
    if isinstance(importance, Tensor):
        return (importance.double() * (wanted / mean)).float()
    read = importance.read

    def scaled(first: int, out_L: Tensor) -> None:
        read(first, out_L)
        for piece_L in torch.split(out_L, _PIECE):
            piece_L.copy_(piece_L.double() * (wanted / mean))

    return Stored(importance.shape, scaled)
