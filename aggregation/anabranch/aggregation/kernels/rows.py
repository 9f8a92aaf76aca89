"""Every contribution's entries as addresses, and the threads that go through them.

Shape legend: C contributions, D entries of a chunk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregation.chunk import Rows

WEIGHTED_SUM = "anabranch.aggregation.kernels.linear:weighted_sum"
MIXTURES = "anabranch.aggregation.kernels.linear:mixtures"
TERNARY_SUM = "anabranch.aggregation.kernels.ternary:weighted_sum"
GRAM = "anabranch.aggregation.kernels.gram:piece_grams"
HISTOGRAM = "anabranch.aggregation.kernels.histogram:histogram"
KTH = "anabranch.aggregation.kernels.histogram:kth"
"""On a GPU only, where counting 64 Ki buckets costs more than a bracket that narrows."""

SMALLEST = 1 << 22
"""Entries of all contributions together from which a module goes through kernels. Loading them
costs a second, and compiling them on a machine's first merge several: more than they save on
adapters of a small model, which torch merges in tens of milliseconds."""

_BLOCK_ENTRIES = 1 << 15
"""Entries of all contributions held at once: half of them twice fit a small L2 cache."""

_PARTS_PER_THREAD = 4
"""So that a thread the machine holds up leaves work to the others."""


def worthwhile(count: int, entries: int, device: torch.device) -> bool:
    """Whether kernels take a module.

    Its whole size decides, and never a chunk's: results must not depend on the budget.

    Args:
        count: C.
        entries: Entries of one contribution's whole module.
        device: Where they are.
    """
    return on_gpu(device) or (device.type == "cpu" and count * entries >= SMALLEST)


def all_worthwhile(rows: Rows) -> bool:
    """Whether kernels take entries that are all there [C, D]."""
    return worthwhile(len(rows), len(rows[0]), rows[0].device) and all(map(readable, rows))


def readable(row_D: Tensor) -> bool:
    """Whether a kernel can read a tensor where it lies."""
    there = row_D.device.type == "cpu" or on_gpu(row_D.device)
    return there and row_D.dtype == torch.float32 and row_D.is_contiguous()


def in_use(device: torch.device) -> bool:
    """Whether this process has paid for loading kernels, so that small work may go through them."""
    return device.type == "cpu" and "anabranch.aggregation.kernels.compiled" in sys.modules


def on_gpu(device: torch.device) -> bool:
    """Whether the kernels for entries there are Triton's: on a GPU, or where it interprets them."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interprets) and find_spec("triton") is not None


def load(place: str, device: torch.device) -> Any:
    """The function that ``module:function`` names, or on a GPU its namesake in ``gpu`` beside it.

    Returns:
        None where there is none: torch does it then.
    """
    module, name = place.split(":")
    if not on_gpu(device):
        return getattr(import_module(module), name)
    package, _, own = module.rpartition(".")
    folder = f"{package}.gpu"
    try:
        return getattr(import_module(f"{folder}.{own}"), name, None)
    except ModuleNotFoundError as error:
        if error.name not in (folder, f"{folder}.{own}"):
            raise
        return None


def has_kernel(place: str | None, device: torch.device) -> bool:
    """Whether ``load`` finds a function; what is for the CPU is not loaded to know."""
    return place is not None and (not on_gpu(device) or load(place, device) is not None)


def addresses(rows: Rows) -> NDArray[np.int64]:
    """Where each contribution's entries begin [C]. Keep ``rows`` alive while these are in use."""
    assert all(readable(row_D) for row_D in rows)
    return np.array([row_D.data_ptr() for row_D in rows], np.int64)


def fp32(numbers: Tensor | Sequence[float]) -> NDArray[np.float32]:
    """Weights, thresholds and the like as the kernels take them [C]."""
    values = numbers.tolist() if isinstance(numbers, Tensor) else numbers
    return np.array(values, np.float32)


def merge_rows(
    rows: Rows, kernel: Callable[..., None], *arguments: Any, block: int | None = None
) -> Tensor:
    """One number per entry by a kernel.

    Args:
        rows: Entries of the contributions [C, D].
        kernel: ``kernel(addresses_C, out_address, first, stop, block, *arguments)`` writes the
            entries from ``first`` to ``stop``, ``block`` at a time.
        arguments: What else it takes.
        block: Entries at a time; None takes what fits the cache.

    Returns:
        What it wrote [D], fp32.
    """
    merged_D = torch.empty(len(rows[0]))
    addresses_C = addresses(rows)
    size = block or max(256, min(4096, _BLOCK_ENTRIES // len(rows) // 64 * 64))

    def part(first: int, stop: int) -> None:
        kernel(addresses_C, merged_D.data_ptr(), first, stop, size, *arguments)

    in_parallel(part, len(merged_D), size)
    return merged_D


def in_parallel(part: Callable[[int, int], object], total: int, grain: int = 1) -> None:
    """Call ``part(first, stop)`` on ranges that cover ``total``, on as many threads as torch uses.

    Threads of our own, since kernels let go of the interpreter lock: numba's, of which there is one
    pool, abort the process when two threads of a program merge at once, or after a fork.

    Args:
        part: Does a range; which ranges there are must not matter to what it computes.
        total: How many there are of what is divided.
        grain: Ranges begin at multiples of it.
    """
    threads = torch.get_num_threads()
    units = -(-total // grain)
    parts = 1 if threads == 1 else min(units, threads * _PARTS_PER_THREAD)
    bounds = [min(total, units * index // max(1, parts) * grain) for index in range(parts + 1)]
    ranges = list(pairwise(bounds))
    if len(ranges) <= 1:
        for first, stop in ranges:
            part(first, stop)
        return
    with ThreadPoolExecutor(min(threads, len(ranges))) as pool:
        for _ in pool.map(lambda bound: part(*bound), ranges):
            pass
