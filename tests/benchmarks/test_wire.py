"""The rivals' codes are given their due: sizes and errors against what theory says."""

import math

import numpy as np
import pytest
from benchmarks import wire_rivals as rivals

X = np.random.default_rng(3).standard_normal(200_000).astype(np.float32)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
def test_golomb_is_within_two_percent_of_the_entropy(density: float) -> None:
    size, error = rivals.compeft(X, density)
    bits = -density * math.log2(density) - (1 - density) * math.log2(1 - density) + density
    assert 1.0 < 8 * size / (bits * X.size) < 1.02
    assert error / float(np.square(X).sum()) == pytest.approx(
        {0.05: 0.727, 0.1: 0.575, 0.2: 0.384}[density], abs=0.01
    )


def test_a_sparse_code_reaches_an_error_with_the_fewest_entries() -> None:
    _, wanted = rivals.compeft(X, 0.1)
    size, error = rivals.at_error(lambda density: rivals.flasc(X, density), wanted)
    assert error <= wanted
    # Exact values reach it with fewer entries: 18 bits of place and 16 of value each.
    kept = 8 * size / (18 + 16)
    assert 0.05 < kept / X.size < 0.1


def test_dense_codes_lose_what_their_steps_do() -> None:
    power = float(np.square(X).sum())
    size, error = rivals.int8([X])
    step = float(np.abs(X).max()) / 127
    assert size == X.size + 4
    assert error / power == pytest.approx(step**2 / 12, rel=0.02)
    size, error = rivals.zstd_fp16(X)
    assert size < 2 * X.size
    assert error / power < 1e-7
