from __future__ import annotations

import pytest
import torch

from anabranch.vectors import LowRank, TaskVector, scaled, stack


def test_rows_of_a_product_are_the_products_rows() -> None:
    torch.manual_seed(0)
    delta = LowRank(torch.randn(12, 3), torch.randn(3, 7))
    torch.testing.assert_close(delta.rows(4, 9), (delta.b_mk @ delta.a_kn)[4:9])
    assert delta.dense().dtype == torch.float32
    assert (delta.shape, delta.rank) == ((12, 7), 3)


def test_stacking_adds_products() -> None:
    torch.manual_seed(0)
    parts = [LowRank(torch.randn(12, k), torch.randn(k, 7)) for k in (1, 2, 4)]
    total = stack(parts)
    assert total.rank == 7
    torch.testing.assert_close(total.dense(), sum(part.dense() for part in parts))


def test_scaling_keeps_the_form() -> None:
    torch.manual_seed(0)
    delta = LowRank(torch.randn(12, 3), torch.randn(3, 7))
    half = scaled(delta, 0.5)
    assert isinstance(half, LowRank)
    torch.testing.assert_close(half.dense(), 0.5 * delta.dense())
    assert torch.equal(scaled(torch.ones(3), -2.0), torch.full((3,), -2.0))


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match=r"b is \(4, 2\), a is \(3, 5\)"):
        LowRank(torch.ones(4, 2), torch.ones(3, 5))


def test_modules_come_in_sorted_order() -> None:
    vector = TaskVector({"b": torch.ones(1), "a": torch.ones(2), "B": torch.ones(3)})
    assert vector.names() == ["B", "a", "b"]
    assert [name for name, _ in vector.items()] == ["B", "a", "b"]
