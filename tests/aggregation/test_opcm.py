"""OPCM: the paper's recursion, one task vector at a time, in memory that does not grow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.methods.opcm import OPCM, OpcmConfig, OpcmState, merge_next
from anabranch.vectors import Delta, LowRank, TaskVector


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def streams(count: int = 4, rank: int | None = None) -> list[TaskVector]:
    """Two matrices and a bias per client, dense or of a given rank."""
    found = []
    for client in range(count):
        deltas: dict[str, Delta] = {"bias": draw(30, seed=1000 + client)}
        for index, (m, n) in enumerate([(30, 20), (16, 25)]):
            seed = 10 * client + index
            if rank is None:
                deltas[f"layer{index}"] = draw(m, n, seed=seed)
            else:
                a_kn = draw(rank, n, seed=seed + 500)
                deltas[f"layer{index}"] = LowRank(draw(m, rank, seed=seed), a_kn)
        found.append(TaskVector(deltas, "ba5e" * 16))
    return found


def entries(vector: TaskVector) -> dict[str, Tensor]:
    return {
        name: delta.b_mk.double() @ delta.a_kn.double()
        if isinstance(delta, LowRank)
        else delta.double()
        for name, delta in vector.items()
    }


def size(model: dict[str, Tensor]) -> float:
    return math.hypot(*(float(tensor.norm()) for tensor in model.values()))


def naive(vectors: list[TaskVector], alpha: float, rank: int | None = None) -> dict[str, Tensor]:
    """The paper's loop with its λ, over whole models; ``rank`` of one task vector, None for full.

    FusionBench's code is this loop at full rank. At lower rank it zeroes the diagonal of P in
    singular vectors of value zero too, so that its result depends on LAPACK's choice of them.
    """
    taus = [entries(vector) for vector in vectors]
    merged, norms, lam = dict(taus[0]), [size(taus[0])], 1.0
    for step, tau in enumerate(taus[1:], start=1):
        norms.append(size(tau))
        for name, tau_mn in tau.items():
            cleaned = tau_mn
            if tau_mn.ndim == 2:
                u, s, v = torch.linalg.svd(merged[name], full_matrices=False)
                live = len(s) if rank is None else min(len(s), step * rank)
                u, s, v = u[:, :live], s[:live], v[:live]
                split = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
                inside = u.T @ tau_mn @ v.T
                kept = inside.clone()
                kept.diagonal().zero_()
                kept[:split, :split] = 0
                cleaned = tau_mn + u @ (kept - inside) @ v
            merged[name] = lam * merged[name] + cleaned
        lam = size(merged) / (sum(norms) / len(norms))
        merged = {name: tensor / lam for name, tensor in merged.items()}
    return merged


def assert_near(found: TaskVector, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, tensor in entries(found).items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < tolerance, name


def run(vectors: list[TaskVector], config: OpcmConfig, weights: list[float]) -> OpcmState:
    state = OpcmState(config)
    for vector, weight in zip(vectors, weights, strict=True):
        state = merge_next(state, vector, weight)
    return state


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rank", [None, 3])
def test_it_is_the_papers_recursion(alpha: float, rank: int | None) -> None:
    vectors = streams(rank=rank)
    expected = naive(vectors, alpha, rank)
    assert_near(run(vectors, OpcmConfig(alpha=alpha), [1.0] * 4).merged(), expected)
    recipe = Recipe(method="opcm", params={"alpha": alpha})
    merged = merge_task_vectors(vectors, recipe)
    assert_near(merged, expected)
    assert isinstance(merged.deltas["layer0"], LowRank) is (rank is not None)
    assert size(entries(merged)) == pytest.approx(sum(size(entries(v)) for v in vectors) / 4)


def test_stale_updates_count_for_less_in_the_sum_and_in_the_norm() -> None:
    vectors = streams(3, rank=2)
    weights = [1.0, 0.25, 0.5]
    merged = run(vectors, OpcmConfig(), weights).merged()
    assert_near(
        merged, entries(merge_task_vectors(vectors, Recipe(method="opcm"), weights=weights))
    )
    norms = [size(entries(vector)) for vector in vectors]
    target = sum(w * x for w, x in zip(weights, norms, strict=True)) / sum(weights)
    assert size(entries(merged)) == pytest.approx(target)
    one, other = (entries(vector)["bias"] for vector in vectors[:2])
    pair = entries(run(vectors[:2], OpcmConfig(), [1.0, 0.25]).merged())["bias"]
    ratio = pair / (one + 0.25 * other)
    torch.testing.assert_close(ratio, ratio[:1].expand(30), atol=1e-5, rtol=1e-5)


def test_a_newcomer_leaves_the_protected_block_alone() -> None:
    vectors = streams(2, rank=4)
    config = OpcmConfig(alpha=0.9)
    first = run(vectors[:1], config, [1.0]).sums["layer0"]
    both = run(vectors, config, [1.0, 1.0]).sums["layer0"]
    assert not isinstance(first, Tensor)
    assert not isinstance(both, Tensor)
    total_mn = both.u_pr @ both.s_r.diag() @ both.v_rq
    split = int((first.s_r.cumsum(0) / first.s_r.sum() <= 0.9).sum())
    assert split >= 2
    seen = first.u_pr.T @ total_mn @ first.v_rq.T
    torch.testing.assert_close(seen[:split, :split], first.s_r[:split].diag())
    torch.testing.assert_close(seen.diagonal(), first.s_r)


def test_equal_matrices_merge_to_themselves() -> None:
    vector = TaskVector({"layer0": streams(1, rank=3)[0].deltas["layer0"]})
    assert_near(run([vector] * 4, OpcmConfig(), [1.0] * 4).merged(), entries(vector))


def held(state: OpcmState) -> int:
    return sum(
        part.numel()
        for total in state.sums.values()
        for part in ((total,) if isinstance(total, Tensor) else total)
    )


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    for config, directions in ((OpcmConfig(rank=5), 5), (OpcmConfig(), 16)):
        state, sizes = OpcmState(config), []
        for vector in streams(20, rank=3):
            state = merge_next(state, vector)
            sizes.append(held(state))
        assert len(set(sizes[8:])) == 1
        total = state.sums["layer1"]
        assert not isinstance(total, Tensor)
        assert len(total.s_r) == directions
    # With all directions kept, the bounded state is no larger than the matrices, twice.
    assert sizes[-1] < 2 * (30 * 20 + 16 * 25) + 30 + 20 * 21


def test_a_state_is_not_changed_by_what_follows() -> None:
    vectors = streams(3, rank=2)
    state = run(vectors[:2], OpcmConfig(), [1.0, 1.0])
    before = entries(state.merged())
    merge_next(state, vectors[2])
    assert_near(state.merged(), before, 1e-12)


def test_zeros_come_first_and_stay_harmless() -> None:
    zero = TaskVector({"m": LowRank(torch.zeros(6, 2), torch.ones(2, 5))})
    assert torch.equal(
        entries(run([zero] * 2, OpcmConfig(), [1.0, 1.0]).merged())["m"].float(), torch.zeros(6, 5)
    )
    some = TaskVector({"m": LowRank(draw(6, 2, seed=0), draw(2, 5, seed=1))})
    merged = entries(run([zero, some], OpcmConfig(), [1.0, 1.0]).merged())
    assert_near(TaskVector({"m": merged["m"]}), {"m": entries(some)["m"] / 2})


def test_updates_that_do_not_belong_are_refused() -> None:
    state = run(streams(1), OpcmConfig(), [1.0])
    good = streams(2)[1].deltas
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"weight: .* give one above zero"):
            merge_next(state, TaskVector(good), weight)
    with pytest.raises(ValueError, match="other modules than those merged, such as extra"):
        merge_next(state, TaskVector({**good, "extra": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"module bias has shape \(4,\) in the update, \(30,\)"):
        merge_next(state, TaskVector({**good, "bias": torch.ones(4)}))
    with pytest.raises(ValueError, match="trained on base feedfeedfeed"):
        merge_next(state, TaskVector(good, "feed" * 16))
    nan = LowRank(torch.full((30, 2), math.nan), torch.ones(2, 20))
    with pytest.raises(ValueError, match=r"the update: module layer0 holds numbers .* not finite"):
        merge_next(state, TaskVector({**good, "layer0": nan}))
    with pytest.raises(ValueError, match="give merge_next at least one"):
        OpcmState().merged()


def test_the_registered_method_says_what_it_is() -> None:
    assert (OPCM.scope, OPCM.mean_norm) == ("model", True)
