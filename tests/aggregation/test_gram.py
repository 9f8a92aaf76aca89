from __future__ import annotations

import pytest
import torch

from anabranch.aggregation import cosine_similarity
from anabranch.aggregation.engine.cohort import gather
from anabranch.aggregation.engine.gram import gram
from anabranch.aggregation.method import squared_distances
from anabranch.aggregation.registry import methods
from anabranch.vectors import LowRank, TaskVector
from anabranch.vectors.sparse import nothing, ternarise


def cohort(count: int = 4) -> list[TaskVector]:
    torch.manual_seed(0)
    return [
        TaskVector(
            {
                "a": LowRank(torch.randn(50, k + 1), torch.randn(k + 1, 20)),
                "b": LowRank(torch.randn(9, 2), torch.randn(2, 60))
                if k % 2
                else torch.randn(9, 60),
                "c": torch.randn(70, 5),
            }
        )
        for k in range(count)
    ]


def flat(vector: TaskVector) -> torch.Tensor:
    parts = [
        d.b_mk.double() @ d.a_kn.double() if isinstance(d, LowRank) else d.double()
        for _, d in vector.items()
    ]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("budget_bytes", [2 << 30, 2 * 4 * 60 * 4 * 6 * 32])
def test_the_gram_matrix_in_factor_space_is_the_dense_one(budget_bytes: int) -> None:
    vectors = cohort()
    flat_CD = torch.stack([flat(vector) for vector in vectors])
    gram_CC = gram(gather(vectors), budget_bytes)
    assert gram_CC.dtype == torch.float64
    torch.testing.assert_close(gram_CC, flat_CD @ flat_CD.T, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(
        squared_distances(gram_CC), torch.cdist(flat_CD, flat_CD).square(), rtol=1e-6, atol=1e-4
    )


def test_factors_alone_are_exact_to_fp64() -> None:
    vectors = [TaskVector({"a": vector.deltas["a"]}) for vector in cohort()]
    flat_CD = torch.stack([flat(vector) for vector in vectors])
    torch.testing.assert_close(gram(gather(vectors)), flat_CD @ flat_CD.T, rtol=1e-12, atol=1e-9)


def test_cosines_compare_directions() -> None:
    one = cohort(1)[0]
    opposite = TaskVector({"a": LowRank(-3 * one.deltas["a"].b_mk, one.deltas["a"].a_kn)})
    nothing = TaskVector({"a": LowRank(torch.zeros(50, 1), torch.ones(1, 20))})
    cosine_CC = cosine_similarity([TaskVector({"a": one.deltas["a"]}), opposite, nothing])
    expected_CC = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(cosine_CC, expected_CC)


@pytest.mark.parametrize("size", [1e3, 1e8, 1e15])
@pytest.mark.parametrize("method", ["geometric_median", "multi_krum"])
def test_one_huge_contribution_does_not_move_the_result(method: str, size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    deltas_CD = torch.randn(8, 50, generator=generator)
    deltas_CD[3] = size * deltas_CD[3] / deltas_CD[3].norm()
    honest_CD = deltas_CD[[0, 1, 2, 4, 5, 6, 7]]
    merged_D = methods()[method](deltas_CD)
    spread = float((honest_CD - honest_CD.mean(0)).norm(dim=1).max())
    assert float((merged_D - honest_CD.mean(0)).norm()) < 0.5 * spread


def test_sparse_ones_are_counted_and_not_decoded() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(40, 30, generator=generator)
    found = [
        ternarise(common + torch.randn(40, 30, generator=generator), density)
        for density in (0.1, 0.5, 1.0, 0.01)
    ]
    found.insert(2, nothing(common.shape))
    sparse = gram(gather([TaskVector({"w": one}) for one in found]))
    dense = gram(gather([TaskVector({"w": one.dense()}) for one in found]))
    torch.testing.assert_close(sparse, dense, atol=0, rtol=1e-13)
    empty = gram(gather([TaskVector({"w": nothing(common.shape)})] * 2))
    assert torch.equal(empty, torch.zeros(2, 2, dtype=torch.float64))
