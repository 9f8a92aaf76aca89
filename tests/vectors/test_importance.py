from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anabranch.vectors import Adapter, LoraFactors, LowRank, Stored
from anabranch.vectors.fisher_file import fisher_layout, read_fisher, stored_fisher, write_fisher
from anabranch.vectors.importance import (
    Over,
    closest_product,
    flat_importance,
    from_flat_importance,
    importance_layout,
    normalised,
)
from anabranch.vectors.task_vector import Delta, Held

ADAPTER = Adapter(
    {"deep.query": LoraFactors(torch.zeros(2, 5), torch.zeros(7, 2), 4.0)},
    {"head.bias": torch.zeros(3)},
)


def squares(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).square()


def importance() -> dict[str, Held]:
    return {
        "deep.query": closest_product(squares(7), squares(5, seed=1)),
        "head.bias": squares(3),
    }


def dense(part: Delta) -> Tensor:
    return part if isinstance(part, Tensor) else part.dense()


def divergence(matrix_mn: Tensor, product_mn: Tensor) -> float:
    return float((matrix_mn * (matrix_mn / product_mn).log() - matrix_mn + product_mn).sum())


def test_the_closest_product_has_the_sums_and_no_neighbour_is_closer() -> None:
    matrix_mn = squares(6, 9).double()
    product = closest_product(matrix_mn.sum(1), matrix_mn.sum(0))
    product_mn = product.dense().double()
    for dim in (0, 1):
        torch.testing.assert_close(product_mn.sum(dim), matrix_mn.sum(dim), rtol=1e-5, atol=0)
    least = divergence(matrix_mn, product_mn)
    for seed in range(20):
        nudge = 1 + 0.05 * squares(6, seed=seed)[:, None] - 0.05 * squares(9, seed=seed)[None, :]
        other = LowRank(product.b_mk * nudge[:, :1], product.a_kn * nudge[:1])
        assert divergence(matrix_mn, other.dense().double()) > least
    exact = closest_product(*(torch.outer(squares(4), squares(3)).sum(d) for d in (1, 0)))
    torch.testing.assert_close(exact.dense(), torch.outer(squares(4), squares(3)))
    assert not closest_product(torch.zeros(4), torch.zeros(3)).dense().any()


def test_the_flat_layout_is_the_adapters() -> None:
    flat = flat_importance(importance())
    assert {name: tuple(t.shape) for name, t in flat.items()} == importance_layout(ADAPTER)
    back = from_flat_importance(flat)
    for name, part in importance().items():
        assert torch.equal(dense(back[name]), dense(part))
    for name in ("deep.query.importance_rows", "deep.query.importance_columns"):
        with pytest.raises(ValueError, match=r"module deep\.query needs"):
            from_flat_importance({name: torch.ones(3)})


@pytest.mark.parametrize("over", ["model", "module"])
def test_normalised_importance_has_a_mean_of_one(over: Over) -> None:
    given = importance()
    given["deep.key"] = LowRank(given["deep.query"].b_mk * 1e20, torch.full((1, 4), 1e-38))
    stored = Stored(torch.Size((3,)), lambda first, out: out.copy_(given["head.bias"][first:]))
    parts: Mapping[str, Delta] = {**given, "head.bias": stored, "never": torch.zeros(2, 2)}
    found = {name: dense(part) for name, part in normalised(parts, over).items()}
    assert not found["never"].any()
    if over == "model":
        assert float(torch.cat([p.flatten() for p in found.values()]).mean()) == pytest.approx(1)
        ratio = dense(given["head.bias"]) / dense(given["deep.query"])[0, :3]
        torch.testing.assert_close(found["head.bias"] / found["deep.query"][0, :3], ratio)
    else:
        means = {name: float(part.mean()) for name, part in found.items()}
        assert means == {name: pytest.approx(float(name != "never")) for name in means}
    assert normalised(parts, "none") == parts


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    assert read_fisher(tmp_path) == fisher_layout(tmp_path) == {}
    write_fisher(importance(), tmp_path)
    found = read_fisher(tmp_path)
    for name, part in importance().items():
        assert torch.equal(dense(found[name]), dense(part))
        assert fisher_layout(tmp_path)[name].shape == part.shape
    assert stored_fisher(tmp_path)[1] == 4 * (7 + 5 + 3)
