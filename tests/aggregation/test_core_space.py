"""The small space holds the task vectors exactly, and shows only directions that are there."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.aggregation.core_space import core_space, directions, polar
from anabranch.vectors import LowRank


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def products(ranks: tuple[int, ...], m: int, n: int) -> list[LowRank]:
    return [LowRank(draw(m, r, seed=i), draw(r, n, seed=50 + i)) for i, r in enumerate(ranks)]


def test_cores_are_the_task_vectors_in_orthonormal_bases() -> None:
    for m, n in ((30, 20), (20, 30), (5, 30)):
        deltas = products((2, 4, 1), m, n)
        space = core_space(deltas)
        assert space.left_mp is not None
        assert space.right_nq is not None
        for basis in (space.left_mp, space.right_nq):
            torch.testing.assert_close(
                basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64)
            )
        for core, delta in zip(space.cores, deltas, strict=True):
            assert isinstance(core, LowRank)
            rebuilt_mn = space.left_mp @ (core.b_mk @ core.a_kn) @ space.right_nq.T
            torch.testing.assert_close(rebuilt_mn, delta.b_mk @ delta.a_kn)
            assert core.rank == delta.rank
            assert max(core.shape) <= 7


def test_what_is_lifted_is_the_sum_and_has_balanced_factors_of_its_own_rank() -> None:
    deltas = products((2, 4), 30, 20)
    deltas.append(deltas[1])
    space = core_space(deltas)
    weights_C = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    lifted = space.lift(space.total(weights_C))
    assert isinstance(lifted, LowRank)
    expected_mn = sum(w * (d.b_mk @ d.a_kn) for w, d in zip(weights_C, deltas, strict=True))
    torch.testing.assert_close(lifted.dense(), expected_mn.float(), atol=1e-5, rtol=1e-5)
    assert lifted.rank == 6
    torch.testing.assert_close(lifted.b_mk.norm(dim=0), lifted.a_kn.norm(dim=1))


def test_one_dense_task_vector_makes_all_dense() -> None:
    deltas = products((2, 4), 30, 20)
    space = core_space([deltas[0], deltas[1].dense().bfloat16()])
    torch.testing.assert_close(space.cores[0], deltas[0].dense())
    total_mn = space.lift(space.total(torch.ones(2)))
    assert isinstance(total_mn, Tensor)
    expected_mn = deltas[0].dense() + deltas[1].dense().bfloat16().float()
    torch.testing.assert_close(total_mn, expected_mn)


def test_the_rank_they_share_is_that_of_the_space_and_not_of_its_factors() -> None:
    deltas = products((2, 4, 3), 30, 20)
    shared = [LowRank(delta.b_mk, draw(4, 20, seed=9)[: delta.rank]) for delta in deltas]
    for some, rank in ((deltas, 9), ([*deltas, deltas[0]], 9), (shared, 4), (deltas[:1] * 3, 2)):
        assert core_space(some).rank() == rank
        assert core_space([delta.b_mk @ delta.a_kn for delta in some]).rank() == rank
    values = torch.linalg.svdvals(torch.cat([delta.b_mk @ delta.a_kn for delta in deltas], 1))
    torch.testing.assert_close(core_space(deltas).joint().s_r, values[:9])


def test_a_product_has_the_directions_of_its_entries() -> None:
    (delta,) = products((4,), 30, 20)
    found, plain = directions(delta, 3), directions(delta.b_mk @ delta.a_kn, 3)
    torch.testing.assert_close(found.s_r, plain.s_r)
    for one, other in ((found.u_pr, plain.u_pr), (found.v_rq.T, plain.v_rq.T)):
        torch.testing.assert_close((one.T @ other).abs(), torch.eye(3, dtype=torch.float64))


def test_nothing_lifts_to_nothing() -> None:
    space = core_space([LowRank(torch.zeros(6, 2), draw(2, 5))] * 2)
    lifted = space.lift(space.total(torch.ones(2)))
    assert torch.equal(lifted.dense(), torch.zeros(6, 5))


def test_directions_leave_out_rounding_and_keep_what_is_small() -> None:
    u_mk = torch.linalg.qr(draw(30, 3)).Q
    v_nk = torch.linalg.qr(draw(20, 3, seed=1)).Q
    matrix_mn = u_mk @ torch.tensor([5.0, 1.0, 1e-4]).double().diag() @ v_nk.T
    noisy_mn = matrix_mn + 1e-8 * draw(30, 20, seed=2)
    found = directions(noisy_mn)
    torch.testing.assert_close(
        found.s_r, torch.tensor([5.0, 1.0, 1e-4]).double(), atol=1e-6, rtol=0
    )
    assert len(directions(noisy_mn, 2).s_r) == 2
    assert len(directions(noisy_mn, 0).s_r) == 0
    assert len(directions(noisy_mn, of=1e7).s_r) == 0
    assert len(directions(torch.zeros(4, 3)).s_r) == 0


def test_the_polar_factor_is_the_nearest_isometry_of_the_same_rank() -> None:
    tall_mk = draw(30, 4)
    gram_kk = tall_mk.T @ tall_mk
    values, vectors = torch.linalg.eigh(gram_kk)
    expected_mk = tall_mk @ vectors @ values.rsqrt().diag() @ vectors.T
    torch.testing.assert_close(polar(tall_mk), expected_mk)
    # Twice the same columns: each copy gets 1/√2 of the polar factor of one.
    doubled = polar(torch.cat([tall_mk, tall_mk], dim=1))
    torch.testing.assert_close(doubled, torch.cat([expected_mk] * 2, dim=1) / 2**0.5)
