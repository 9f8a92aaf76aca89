"""Inner products in fp64 of entries in fp32, a tile of contributions at a time.

Products of two fp32 numbers are exact in fp64, so sums alone round, and their order is fixed: four
of them run through a piece of entries side by side, the pieces follow each other. The relative
error of ⟨τ, τ⟩ is below 2⁻⁵³·(PIECE / 4 + pieces), 2e-12 for a billion entries; that of ⟨τ, τ'⟩ is
so in units of Σ |τ·τ'|.

Entries are read once, made wide in a cache, and used there by every tile. No BLAS comes near it:
they are made for many rows and columns, and here there are as many as contributions.

Shape legend: C contributions, P pieces, B entries of a block, D entries of a chunk, T tiles of I
rows and J columns, L lanes of a sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregation.chunk import PIECE, Rows
from anabranch.aggregation.kernels.compiled import Int64, compiled, entries_at
from anabranch.aggregation.kernels.rows import addresses, in_parallel

Fp64 = NDArray[np.float64]

_I, _J, _LANES = 3, 4, 4
"""A tile's 12 sums, three rows and one column fill the 16 registers of AVX2."""

_BLOCK = 128
"""Entries in fp64 at once: those of 20 contributions stay in L1, those of 100 in L2."""


def piece_grams(rows: Rows) -> Tensor:
    """⟨τ_i, τ_j⟩ of each piece of ``PIECE`` entries, the last one shorter [P, C, C], fp64.

    Args:
        rows: Entries of the contributions [C, D], fp32, on the CPU.
    """
    count, entries = len(rows), len(rows[0])
    pieces = -(-entries // PIECE)
    grams_PCC = np.zeros((pieces, count, count))
    addresses_C = addresses(rows)

    def part(first: int, stop: int) -> None:
        for piece in range(first, stop):
            start = piece * PIECE
            _gram(addresses_C, start, min(start + PIECE, entries), grams_PCC[piece])

    in_parallel(part, pieces)
    return torch.from_numpy(grams_PCC)


@intrinsic
def _tile(typing_context: Any, rows: Any, columns: Any, stride: Any, size: Any, out: Any) -> Any:
    """Adds the products of ``_I`` rows with ``_J`` others to the sums ``out`` [I, J, L], fp64.

    ``rows`` and ``columns`` are the addresses of the first, ``stride`` bytes lie from one to the
    next, and ``size`` entries, a multiple of the lanes, are in each. The compiler finds no such
    loop in plain code: it may not change the order of a sum.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, columns, stride, size, out = arguments
        word, fp64 = ir.IntType(64), ir.DoubleType()
        vector = ir.VectorType(fp64, _LANES)
        # Fused or not, the sum is the same: the product is exact.
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{_LANES}f64"
        )

        def sum_at(place: int) -> Any:
            address = builder.add(out, ir.Constant(word, 8 * _LANES * place))
            return builder.inttoptr(address, vector.as_pointer())

        sums = []
        for place in range(_I * _J):
            before = builder.load(sum_at(place))
            before.align = 8
            sums.append(cgutils.alloca_once_value(builder, before))

        def load(base: Any, place: int, offset: Any) -> Any:
            lines = builder.mul(stride, ir.Constant(word, place))
            address = builder.add(builder.add(base, lines), offset)
            found = builder.load(builder.inttoptr(address, vector.as_pointer()))
            found.align = 8
            return found

        step = ir.Constant(word, _LANES)
        with cgutils.for_range_slice(builder, ir.Constant(word, 0), size, step, word) as (at, _):
            offset = builder.mul(at, ir.Constant(word, 8))
            left = [load(rows, place, offset) for place in range(_I)]
            for column in range(_J):
                right = load(columns, column, offset)
                for row in range(_I):
                    sum_ = sums[row * _J + column]
                    terms = [left[row], right, builder.load(sum_)]
                    builder.store(builder.call(multiply_add, terms), sum_)
        for place, sum_ in enumerate(sums):
            builder.store(builder.load(sum_), sum_at(place)).align = 8
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), generate


@compiled
def _gram(addresses_C: Int64, first: int, stop: int, gram_CC: Fp64) -> None:
    count = len(addresses_C)
    # Rows beyond the last are zeros, so every tile is whole.
    wide_CB = np.zeros(((count + 11) // 12 * 12, _BLOCK))
    rows, columns = (count + _I - 1) // _I, (count + _J - 1) // _J
    sums_TIJL = np.zeros((rows * columns, _I, _J, _LANES))
    wide, sums, line = wide_CB.ctypes.data, sums_TIJL.ctypes.data, _BLOCK * 8
    for start in range(first, stop, _BLOCK):
        size = min(_BLOCK, stop - start)
        for c in range(count):
            wide_B, delta_B = wide_CB[c], entries_at(addresses_C[c], start, size)
            for i in range(size):
                wide_B[i] = delta_B[i]
            for i in range(size, _BLOCK):
                wide_B[i] = 0
        tile = 0
        for row in range(0, count, _I):
            for column in range(0, min(row + _I, count), _J):
                out = sums + tile * _I * _J * _LANES * 8
                _tile(wide + row * line, wide + column * line, line, _BLOCK, out)
                tile += 1
    tile = 0
    for row in range(0, count, _I):
        for column in range(0, min(row + _I, count), _J):
            for i in range(row, min(row + _I, count)):
                for j in range(column, min(column + _J, i + 1)):
                    lane_L = sums_TIJL[tile, i - row, j - column]
                    gram_CC[i, j] = (lane_L[0] + lane_L[1]) + (lane_L[2] + lane_L[3])
                    gram_CC[j, i] = gram_CC[i, j]
            tile += 1
