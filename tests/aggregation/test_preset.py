"""``recipe = "robust"``: what it stands for, what it refuses, and that it withstands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, load_recipe, merge_task_vectors, plan_merge
from anabranch.aggregation.engine.keep import merge_keeping
from anabranch.aggregation.preset import RobustConfig, spelled_out
from anabranch.aggregation.registry import named
from anabranch.vectors import Adapter, TaskVector
from anabranch.vectors.adapter import LoraFactors
from anabranch.vectors.peft_folder import write_adapter
from anabranch.vectors.task_vector import LowRank


def robust(**params: Any) -> Recipe:
    return Recipe.model_validate({"method": "robust", "params": params})


def merged(deltas_CD: Tensor, recipe: Recipe) -> Tensor:
    total = merge_task_vectors([TaskVector({"m": delta_D[None]}) for delta_D in deltas_CD], recipe)
    assert isinstance(total.deltas["m"], Tensor)
    return total.deltas["m"][0]


def cohort(count: int = 10, entries: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(entries, generator=generator) + torch.randn(
        count, entries, generator=generator
    )


def test_it_is_the_composition_written_out() -> None:
    deltas_CD = cohort()
    deltas_CD[3] *= -40
    told = {"f": 2}
    steps: list[dict[str, Any]] = [
        {"name": "oversized"},
        {"name": "clip"},
        {"name": "alike", "params": told},
    ]
    whole = {"method": "geometric_median", "pre": steps}
    assert torch.equal(merged(deltas_CD, robust(f=2)), merged(deltas_CD, Recipe(**whole)))
    assert torch.equal(merged(deltas_CD, robust()), merged(deltas_CD, Recipe(**whole)))
    assert named(robust()).name == "geometric_median"


@pytest.mark.parametrize(
    ("share", "count", "f"), [(0.2, 10, 2), (0.2, 11, 3), (0.2, 15, 3), (0.3, 10, 3), (0.1, 3, 1)]
)
def test_a_share_is_rounded_up(share: float, count: int, f: int) -> None:
    assert RobustConfig(f=share).malicious(count) == f


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_told_of_none_it_is_the_mean(count: int) -> None:
    deltas_CD = cohort(count)
    torch.testing.assert_close(merged(deltas_CD, robust(f=0)), deltas_CD.mean(dim=0))


def test_what_a_minority_sends_moves_it_no_further_than_the_honest_spread() -> None:
    deltas_CD = cohort()
    honest_HD = deltas_CD[2:]
    spread = float((honest_HD - honest_HD.mean(dim=0)).norm(dim=1).mean())
    for sent_D in (1e6 * torch.ones(300), -deltas_CD.mean(dim=0), torch.zeros(300)):
        deltas_CD[:2] = sent_D
        moved = float((merged(deltas_CD, robust(f=2)) - honest_HD.mean(dim=0)).norm())
        assert moved < spread
    # The mean does not stand that: the test can fail.
    deltas_CD[:2] = 1e6
    away = float((merged(deltas_CD, Recipe(method="mean")) - honest_HD.mean(dim=0)).norm())
    assert away > 100 * spread


def test_told_of_too_few_it_stays_bounded() -> None:
    """NNM alone does not: the median norm is nobody's to move."""
    deltas_CD = cohort(20)
    deltas_CD[:6] = 1e6
    nnm = {"method": "geometric_median", "pre": [{"name": "nnm", "params": {"f": 4}}]}
    honest_D = deltas_CD[6:].mean(dim=0)
    assert float((merged(deltas_CD, robust(f=4)) - honest_D).norm()) < 30
    assert float((merged(deltas_CD, Recipe(**nnm)) - honest_D).norm()) > 1000


def test_colluders_of_honest_length_are_left_out_and_honest_clients_are_not() -> None:
    """What clipping and selection by distance let through: a tight group as long as the others."""
    generator = torch.Generator().manual_seed(5)
    common_D, wanted_D = torch.randn(2, 4000, generator=generator)
    deltas_CD = torch.randn(10, 4000, generator=generator) + 0.3 * common_D
    honest_D = deltas_CD[:6].mean(dim=0)
    calm_D = deltas_CD.mean(dim=0)
    assert float((merged(deltas_CD, robust(f=4)) - calm_D).norm()) < 0.05 * float(calm_D.norm())
    deltas_CD[6:] = 0.8 * deltas_CD[6:] + 0.6 * wanted_D
    away = float((merged(deltas_CD, robust(f=4)) - honest_D).norm())
    assert away < 0.05 * float(honest_D.norm())
    old = [{"name": name, "params": {"f": 4}} for name in ("arc", "nnm")]
    arc_D = merged(deltas_CD, Recipe.model_validate({"method": "geometric_median", "pre": old}))
    assert float((arc_D - honest_D).norm()) > 0.5 * float(honest_D.norm())


def test_no_product_is_formed() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [
        TaskVector(
            {
                "m": LowRank(
                    torch.randn(8, 2, generator=generator), torch.randn(2, 6, generator=generator)
                )
            }
        )
        for _ in range(5)
    ]
    assert isinstance(merge_task_vectors(vectors, robust(f=1)).deltas["m"], LowRank)


@pytest.mark.parametrize(
    ("given", "count", "reason"),
    [
        ({"params": {"f": 5}}, 10, "params.f: 5 malicious of 10 .* wait for 11, or lower f"),
        ({"params": {"f": 0.4}}, 2, r"params.f: 1 \(0.4 of them, rounded up\) malicious of 2"),
        ({}, 1, "params.f: 1 .* malicious of 1"),
        ({"params": {"f": 0.5}}, 10, "params.f: .* got 0.5"),
        ({"params": {"f": -1}}, 10, "params.f: .* got -1"),
        ({"params": {"m": 1}}, 10, "params.m: Extra"),
        ({"pre": [{"name": "clip"}]}, 10, "robust brings its own steps"),
        ({"weights": [1.0] * 9 + [2.0]}, 10, "count each contribution once"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    given: dict[str, Any], count: int, reason: str
) -> None:
    recipe = Recipe.model_validate({"method": "robust", **given})
    with pytest.raises(ValueError, match=reason) as caught:
        merged(cohort(count), recipe)
    assert "\n" not in str(caught.value)


def test_f_may_differ_by_module() -> None:
    deltas_CD = cohort(9)
    vectors = [TaskVector({"a": delta_D[None], "b": delta_D[None]}) for delta_D in deltas_CD]
    rules = [{"match": "b", "params": {"f": 0}}]
    recipe = Recipe.model_validate({"method": "robust", "params": {"f": 4}, "modules": rules})
    total = merge_task_vectors(vectors, recipe).deltas
    assert isinstance(total["b"], Tensor)
    torch.testing.assert_close(total["b"][0], deltas_CD.mean(dim=0))
    assert not torch.allclose(total["a"], total["b"])  # type: ignore[arg-type]


def test_the_word_alone_is_a_recipe(tmp_path: Path) -> None:
    assert Recipe.model_validate("robust") == robust()
    for name, text in (("a.toml", 'recipe = "robust"\n'), ("a.yaml", "recipe: robust\n")):
        (tmp_path / name).write_text(text)
        assert load_recipe(tmp_path / name) == robust()
    (tmp_path / "b.toml").write_text('recipe = "sturdy"\n')
    with pytest.raises(ValueError, match=re.escape('recipe: must be a table of keys, or "robust"')):
        load_recipe(tmp_path / "b.toml")
    with pytest.raises(ValueError, match="not sturdy"):
        Recipe.model_validate("sturdy")


def test_another_recipe_is_left_as_it_is() -> None:
    recipe = Recipe(method="ties", params={"density": 0.1})
    assert spelled_out(recipe, 3) is recipe


def adapters(count: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(1)

    def one() -> Adapter:
        a_rn = torch.randn(2, 6, generator=generator)
        b_mr = torch.randn(8, 2, generator=generator)
        return Adapter({"m": LoraFactors(a_rn, b_mr, 4.0)}, {}, "0" * 64)

    return [one() for _ in range(count)]


def test_the_plan_says_what_it_merges_by(tmp_path: Path) -> None:
    folders = [tmp_path / f"client-{number}" for number in range(4)]
    for adapter, folder in zip(adapters(4), folders, strict=True):
        write_adapter(adapter, folder)
    assert plan_merge(folders, robust(f=1)).method == "geometric_median"
    with pytest.raises(ValueError, match="2 malicious of 4"):
        plan_merge(folders, robust(f=2))


def test_fedex_which_averages_everybody_is_refused() -> None:
    several = adapters(5)
    with pytest.raises(ValueError, match="fedex: trains on from plain means"):
        merge_keeping(several, robust(f=1), "fedex", start=several[0], fresh=several[0], frozen={})
