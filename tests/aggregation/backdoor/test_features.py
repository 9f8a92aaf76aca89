from __future__ import annotations

import math

import pytest
import torch

from anabranch.aggregation.backdoor.features import (
    SHARE_END,
    module_features,
    trained_factors,
    with_floor,
)
from anabranch.vectors import Adapter, LoraFactors
from anabranch.vectors.sparse import SparseTernary
from anabranch.vectors.task_vector import LowRank, stack


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_svd(matrix_mn: torch.Tensor) -> dict[str, float]:
    """The features from the matrix itself."""
    wide_mn = matrix_mn.double()
    s_k = torch.linalg.svdvals(wide_mn)
    share = float(s_k[0] ** 2 / (s_k**2).sum())
    share = min(max(share, SHARE_END), 1 - SHARE_END)
    rows_m, columns_n = wide_mn.square().sum(1), wide_mn.square().sum(0)
    return {
        "spectrum": math.log(share / (1 - share)),
        "energy": math.log(float(s_k[0])),
        "rows": math.log(float(rows_m.max() / rows_m.mean())),
        "columns": math.log(float(columns_n.max() / columns_n.mean())),
    }


def test_features_of_factors_are_those_of_the_product() -> None:
    now = LowRank(draw(1, 40, 4), draw(2, 4, 30))
    near = LowRank(-now.b_mk, now.a_kn + 1e-3 * draw(3, 4, 30))
    for delta in (now, stack([now, near]), LowRank(draw(4, 40, 1), draw(5, 1, 30))):
        (found,) = module_features([delta])
        wanted = {**by_svd(delta.dense()), "balance": math.nan}
        assert found == pytest.approx(wanted, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("shape", [(40, 30), (3, 50)])
def test_features_of_a_dense_change_are_its_own(shape: tuple[int, int]) -> None:
    matrix_mn = draw(6, *shape)
    (found,) = module_features([matrix_mn])
    assert found == pytest.approx({**by_svd(matrix_mn), "balance": math.nan}, rel=1e-6, nan_ok=True)


def test_a_vector_has_a_norm_and_a_peak() -> None:
    (found,) = module_features([torch.tensor([3.0, 0.0, 4.0])])
    assert found["energy"] == pytest.approx(math.log(5.0))
    assert found["rows"] == pytest.approx(math.log(16 / (25 / 3)))
    assert math.isnan(found["spectrum"])


def test_a_sparse_change_is_read_as_its_entries() -> None:
    positions = torch.tensor([0, 5, 17])
    sparse = SparseTernary(positions, torch.tensor([True, False, False]), 0.5, torch.Size((4, 6)))
    dense = sparse.dense()
    assert module_features([sparse]) == module_features([dense])


def test_balance_is_of_what_training_changed() -> None:
    start = Adapter({"m": LoraFactors(draw(1, 2, 5), draw(2, 6, 2), 4.0)})
    factors = start.lora["m"]
    end = Adapter({"m": LoraFactors(factors.a_rn + 0.1, factors.b_mr - 0.3, 4.0)})
    (one,) = trained_factors([end], [start])["m"]
    assert one.b == pytest.approx(2.0 * 0.3 * math.sqrt(12), rel=1e-6)
    assert one.a == pytest.approx(0.1 * math.sqrt(10), rel=1e-6)
    (alone,) = trained_factors([end], [None])["m"]
    assert alone.a == pytest.approx(float(end.lora["m"].a_rn.norm()), rel=1e-6)


def test_spectra_compare_at_the_usual_rank_only() -> None:
    adapters = [
        Adapter({"m": LoraFactors(draw(i, rank, 5), draw(9 + i, 6, rank), 4.0)})
        for i, rank in enumerate((3, 3, 1))
    ]
    trained = trained_factors(adapters, [None] * 3)["m"]
    table = module_features([one.lora["m"].delta() for one in adapters], trained)
    assert [math.isnan(one["spectrum"]) for one in table] == [False, False, True]
    assert [math.isnan(one["balance"]) for one in table] == [False, False, True]
    assert not any(math.isnan(one["energy"]) for one in table)


def test_a_module_that_only_one_changes_is_far_above_the_floor() -> None:
    zero = torch.zeros(4, 4)
    tables = {"m": module_features([zero, zero, zero, draw(1, 4, 4)])}
    floored = with_floor(tables, [1.0, 1.0, 1.0, 1.0])["m"]
    assert floored[0]["energy"] == pytest.approx(math.log(1e-3))
    assert floored[3]["energy"] - floored[0]["energy"] > 5
