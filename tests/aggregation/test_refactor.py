from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.engine import refactor
from anabranch.aggregation.engine.refactor import (
    low_rank_spectrum,
    matrix_rows,
    streamed_spectrum,
)
from anabranch.vectors import LowRank

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def optimum(matrix_mn: Tensor, rank: int) -> tuple[float, float]:
    s_k = torch.linalg.svdvals(matrix_mn.double())
    return float(s_k[rank:].norm()), float(s_k.norm())


@pytest.mark.parametrize(("m", "n", "inner"), [(60, 45, 12), (45, 60, 12), (20, 30, 50)])
def test_stacked_factors_truncate_to_the_optimum(m: int, n: int, inner: int) -> None:
    delta = LowRank(draw(m, inner), draw(inner, n, seed=1))
    found = low_rank_spectrum(delta, 5)
    dense_mn = delta.b_mk.double() @ delta.a_kn.double()
    residual, norm = optimum(dense_mn, 5)
    assert found.residual == pytest.approx(residual, rel=1e-9)
    assert found.norm == pytest.approx(norm, rel=1e-9)
    approximation_mn = found.u_mk @ found.s_k.diag() @ found.v_kn
    assert float((dense_mn - approximation_mn).norm()) == pytest.approx(residual, rel=1e-9)
    torch.testing.assert_close(found.u_mk.T @ found.u_mk, torch.eye(5, dtype=torch.float64))


def decaying(m: int, n: int) -> Tensor:
    u_mk = torch.linalg.qr(draw(m, min(m, n))).Q
    v_nk = torch.linalg.qr(draw(n, min(m, n), seed=1)).Q
    return (u_mk * 0.9 ** torch.arange(min(m, n))) @ v_nk.T


@pytest.mark.parametrize("matrix_mn", [draw(150, 220), draw(220, 150), decaying(200, 130)])
def test_a_streamed_matrix_comes_within_a_percent_of_the_optimum(matrix_mn: Tensor) -> None:
    found = streamed_spectrum(matrix_rows(matrix_mn), tuple(matrix_mn.shape), 8, "m", CPU)
    residual, norm = optimum(matrix_mn, 8)
    assert residual * (1 - 1e-9) <= found.residual <= residual * 1.01
    assert found.norm == pytest.approx(norm, rel=1e-9)


def test_the_residual_is_that_of_what_is_returned() -> None:
    matrix_mn = draw(90, 130)
    found = streamed_spectrum(matrix_rows(matrix_mn), (90, 130), 8, "m", CPU)
    approximation_mn = found.u_mk @ found.s_k.diag() @ found.v_kn
    assert found.residual == pytest.approx(
        float((matrix_mn.double() - approximation_mn).norm()), rel=1e-9
    )


def test_a_matrix_of_low_rank_streams_without_loss() -> None:
    matrix_mn = draw(100, 4) @ draw(4, 70, seed=1)
    found = streamed_spectrum(matrix_rows(matrix_mn), (100, 70), 4, "m", CPU)
    assert found.residual / found.norm < 1e-6
    torch.testing.assert_close(
        (found.u_mk @ found.s_k.diag() @ found.v_kn).float(), matrix_mn, atol=1e-4, rtol=1e-4
    )


def test_streaming_reads_the_matrix_a_fixed_number_of_times() -> None:
    matrix_mn = draw(100, 30)
    reads = []

    def rows() -> Iterator[tuple[int, Tensor]]:
        reads.append(1)
        for start in range(0, 100, 32):
            yield start, matrix_mn[start : start + 32]

    in_chunks = streamed_spectrum(rows, (100, 30), 3, "m", CPU)
    assert len(reads) == refactor.ITERATIONS + 1
    whole = streamed_spectrum(matrix_rows(matrix_mn), (100, 30), 3, "m", CPU)
    torch.testing.assert_close(in_chunks.s_k, whole.s_k)
    assert in_chunks.residual == pytest.approx(whole.residual, rel=1e-9)


def test_matrices_smaller_than_the_sketch_and_zero_ones_work() -> None:
    tiny_mn = draw(3, 5)
    found = streamed_spectrum(matrix_rows(tiny_mn), (3, 5), 8, "m", CPU)
    assert found.residual < 1e-6
    torch.testing.assert_close((found.u_mk @ found.s_k.diag() @ found.v_kn).float(), tiny_mn)
    nothing = streamed_spectrum(matrix_rows(torch.zeros(40, 30)), (40, 30), 4, "m", CPU)
    assert (nothing.norm, nothing.residual) == (0, 0)
    assert bool(nothing.u_mk.isfinite().all())
