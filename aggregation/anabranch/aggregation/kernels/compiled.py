"""What all kernels are compiled with and built from.

Shape legend: C contributions, B entries of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Fp32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).digest()
"""Tells this folder's files from what they were."""


def compiled(function: F) -> F:
    """Compile on first use and keep the result on disk.

    No fast-math: kernels round as torch does. The numpy error model divides by zero without a
    branch, which would keep loops from being vectorised.
    """
    jitted: F = njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)(function)
    # numba looks for changes in the function's own file. What it calls in others is compiled into
    # it, so a change of those makes it stale too. There is no public way to say so; where numba
    # has other names one day, test_compiled.py fails.
    kept = getattr(getattr(jitted, "_cache", None), "_cache_file", None)
    if kept is not None and hasattr(kept, "_source_stamp"):
        kept._source_stamp = (kept._source_stamp, _SOURCES)
    return jitted


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once: what torch's ``add_(alpha=)`` computes on processors that have it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def exchange(typing_context: Any, one: Any, other: Any, size: Any) -> Any:
    """Puts the smaller of each pair of fp32 numbers at ``one`` and the larger at ``other``.

    These are addresses; ``size``, a multiple of 8, numbers are at each, none of them NaN. Written
    out since the compiler leaves such a loop scalar, at an eighth of the speed.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, other, size = arguments
        word, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), 8)
        step = ir.Constant(word, 8)
        with cgutils.for_range_slice(builder, ir.Constant(word, 0), size, step, word) as (at, _):
            offset = builder.mul(at, ir.Constant(word, 4))
            places = [
                builder.inttoptr(builder.add(base, offset), vector.as_pointer())
                for base in (one, other)
            ]
            low, high = (builder.load(place) for place in places)
            low.align = high.align = 4
            # Not a comparison and a choice: it would become a masked store, which is slow.
            for name, place in zip(("minnum", "maxnum"), places, strict=True):
                choose = cgutils.get_or_insert_function(
                    builder.module, ir.FunctionType(vector, [vector] * 2), f"llvm.{name}.v8f32"
                )
                found = builder.call(choose, [low, high], fastmath=("nnan", "nsz"))
                builder.store(found, place).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@compiled
def entries_at(address: int, first: int, count: int) -> Fp32:
    """``count`` fp32 numbers from the ``first`` one of those at an address."""
    found: Fp32 = carray(pointer(address + 4 * first), (count,), np.float32)
    return found


@compiled
def bits_at(address: int, first: int, count: int) -> NDArray[np.int32]:
    """The same as int32 with the same bits."""
    found: NDArray[np.int32] = carray(pointer(address + 4 * first), (count,), np.int32)
    return found


@compiled
def add_up(kept_CB: Fp32, weights_C: Fp32, sum_B: Fp32) -> None:
    """Σ w τ of a block, as ``method.combine`` adds it up."""
    for i in range(len(sum_B)):
        sum_B[i] = 0
    for c in range(len(weights_C)):
        weight, kept_B = weights_C[c], kept_CB[c]
        if weight != 0:
            for i in range(len(sum_B)):
                sum_B[i] = fma(kept_B[i], weight, sum_B[i])


@compiled
def elect_and_average(
    kept_CB: Fp32, votes_C: Fp32, weights_C: Fp32, sign_B: Fp32, share_B: Fp32, sum_B: Fp32
) -> None:
    """``election.disjoint_mean`` with the signs of Σ votes·τ, into ``sum_B``."""
    add_up(kept_CB, votes_C, sum_B)
    for i in range(len(sum_B)):
        sign_B[i] = np.float32(1) if sum_B[i] >= 0 else np.float32(-1)
        sum_B[i] = 0
        share_B[i] = 0
    for c in range(len(weights_C)):
        weight, kept_B = weights_C[c], kept_CB[c]
        for i in range(len(sum_B)):
            agreeing = kept_B[i] * sign_B[i]
            sum_B[i] = fma(agreeing if agreeing > 0 else np.float32(0), weight, sum_B[i])
            share_B[i] += weight if agreeing > 0 else np.float32(0)
    for i in range(len(sum_B)):
        share = share_B[i]
        sum_B[i] = sum_B[i] * sign_B[i] / (np.float32(1) if share == 0 else share)


@compiled
def fuse(
    elects: bool, kept_CB: Fp32, weights_C: Fp32, sign_B: Fp32, share_B: Fp32, sum_B: Fp32
) -> None:
    """Elect and average, or add up, what a method kept of a block."""
    if elects:
        elect_and_average(kept_CB, weights_C, weights_C, sign_B, share_B, sum_B)
    else:
        add_up(kept_CB, weights_C, sum_B)
