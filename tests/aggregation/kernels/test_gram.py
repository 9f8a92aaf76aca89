"""Inner products by the kernel: to fp64, whatever the cut, the threads and the other numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.chunk import PIECE, recut
from anabranch.aggregation.engine import gram as engine_gram
from anabranch.aggregation.engine.cohort import gather
from anabranch.aggregation.engine.gram import gram, module_grams
from anabranch.aggregation.kernels import rows as kernel_rows
from anabranch.aggregation.kernels.gram import piece_grams
from anabranch.aggregation.method import squared_distances
from anabranch.vectors import LowRank, TaskVector


def draw(count: int, entries: int) -> Tensor:
    return torch.randn(count, entries, generator=torch.Generator().manual_seed(count + entries))


def exact(deltas_CD: Tensor) -> np.ndarray:
    """In the widest numbers there are: 64 bits of mantissa on x86."""
    wide = deltas_CD.numpy().astype(np.longdouble)
    return wide @ wide.T


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11, 12, 13, 20, 33])
@pytest.mark.parametrize("entries", [1, 127, 128, 129, 1003])
def test_any_shape(count: int, entries: int) -> None:
    deltas_CD = draw(count, entries)
    (found,) = piece_grams(deltas_CD)
    wanted = torch.from_numpy(exact(deltas_CD).astype(np.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-12)
    assert torch.equal(found, found.T)


def test_the_error_is_within_the_bound_where_fp32_is_lost() -> None:
    """Task vectors that share a large part: their distances are a ten-millionth of their norms."""
    entries = 3 * PIECE + 77
    near_CD = 1000 + draw(6, entries)
    wanted = exact(near_CD)
    bound = 2.0**-53 * (PIECE / 4 + 4) * wanted
    found = piece_grams(near_CD).sum(dim=0)
    assert len(piece_grams(near_CD)) == 4
    assert (np.abs(found.numpy() - wanted) <= bound).all()
    apart = np.array(
        [[float(((one - other).double() ** 2).sum()) for other in near_CD] for one in near_CD]
    )
    distances = squared_distances(found).numpy()
    np.testing.assert_allclose(distances, apart, rtol=1e-6, atol=1e-6 * apart.max())
    in_fp32 = squared_distances((near_CD @ near_CD.T).double()).numpy()
    assert np.abs(in_fp32 - apart).max() > 0.01 * apart.max()


@pytest.mark.parametrize("size", [1e-30, 1e15, 1e30])
def test_any_unit_and_one_far_larger(size: float) -> None:
    deltas_CD = draw(5, 2000)
    deltas_CD[2] *= size
    wanted = torch.from_numpy(exact(deltas_CD).astype(np.float64))
    (found,) = piece_grams(deltas_CD)
    norms_C = wanted.diagonal().sqrt()
    assert float(((found - wanted) / norms_C[:, None] / norms_C).abs().max()) < 1e-13


def test_threads_budget_and_where_entries_lie_change_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1)
    b_mk, a_kn = draw(5 * 700, 3).view(5, 700, 3), draw(15, 900).view(5, 3, 900)
    whole = [TaskVector({"w": b @ a}) for b, a in zip(b_mk, a_kn, strict=True)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(gram(gather(whole)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    # One that is a product of factors is formed a few rows at a time, for all of them.
    mixed = [*whole[:4], TaskVector({"w": LowRank(b_mk[4], a_kn[4])})]
    tight, roomy = (gram(gather(mixed), size) for size in (7 << 20, 1 << 28))
    assert torch.equal(tight, roomy)
    torch.testing.assert_close(tight, found[0], rtol=1e-6, atol=1e-2)


def test_recut_gives_the_same_pieces_one_by_one_and_several_at_once() -> None:
    whole = draw(2, 5 * PIECE + 9)
    cuts = [0, 10, PIECE + 10, 4 * PIECE, 4 * PIECE + 1, 5 * PIECE + 9]
    stream = [whole[:, a:b] for a, b in pairwise(cuts)]
    single = [piece.clone() for piece in recut(stream)]
    several = [p.clone() for many in recut(stream, several=True) for p in many.split(PIECE, dim=1)]
    assert [piece.shape for piece in several] == [piece.shape for piece in single]
    assert all(torch.equal(one, other) for one, other in zip(several, single, strict=True))
    assert torch.equal(torch.cat(single, dim=1), whole)


@pytest.mark.parametrize("smallest", [1, 1 << 60], ids=["kernel", "torch"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["multi_krum", "bulyan", "dnc", "crfl"])
def test_what_is_not_finite_is_named_without_a_look_of_its_own(
    method: str, wrong: float, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_rows, "SMALLEST", smallest)
    deltas_CD = draw(8, 600)
    deltas_CD[5, 17] = wrong
    vectors = [TaskVector({"m": one[:500], "n": one[500:]}) for one in deltas_CD]
    with pytest.raises(ValueError, match=r"^contribution 5: module m holds numbers that are not"):
        merge_task_vectors(vectors, Recipe(method=method))


def test_wide_numbers_beyond_fp32_are_refused_too() -> None:
    vectors = [TaskVector({"m": torch.full((6,), 1.0, dtype=torch.float64)}) for _ in range(5)]
    vectors[3].deltas["m"][2] = 1e39
    with pytest.raises(ValueError, match=r"^contribution 3: module m"):
        merge_task_vectors(vectors, Recipe(method="geometric_median"))


def test_large_modules_go_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_gram, "inner_products", None)
    entries = kernel_rows.SMALLEST // 4
    deltas_CD = draw(4, entries)
    found = module_grams(gather([TaskVector({"m": one}) for one in deltas_CD]))["m"]
    torch.testing.assert_close(found, deltas_CD.double() @ deltas_CD.double().T, rtol=1e-11, atol=0)
