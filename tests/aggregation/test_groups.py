"""Groups of modules merge as models of their own, wherever a recipe is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anabranch.aggregation import (
    Recipe,
    merge,
    merge_checkpoints,
    merge_one_factor,
    merge_task_vectors,
)
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.recipe import load_recipe
from anabranch.vectors import Adapter, LowRank, TaskVector

NAMES = ("a", "b", "c", "d", "e")
SHAPES = {
    f"layer.{i}.{part}": shape
    for i in range(3)
    for part, shape in (("q", (12, 9)), ("up", (20, 12)), ("norm", (12,)))
}
METHODS = [m for m in BUILT_IN if not m.needs_importance and m.name != "slerp"]
NEEDS = {"bulyan": {"f": 0}, "fltrust": {"root": "contribution 0"}}
WITH_SCOPES: list[tuple[str, dict[str, Any]]] = [
    (method.name, params)
    for method in METHODS
    for params in (
        [NEEDS[method.name]]
        if method.name in NEEDS
        else [{"scope": scope} for scope in ("tensor", "model")]
        if "scope" in method.config.model_fields
        else [{}]
    )
]


def recipe(method: str, **fields: Any) -> Recipe:
    return Recipe.model_validate({"method": method, **fields})


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


VECTORS = [TaskVector(drawn(seed)) for seed in range(5)]


def part(vector: TaskVector, end: str) -> TaskVector:
    return TaskVector({name: d for name, d in vector.deltas.items() if name.endswith(end)})


def entries(vector: TaskVector) -> dict[str, Tensor]:
    return {
        name: delta.dense() if isinstance(delta, LowRank) else torch.as_tensor(delta)
        for name, delta in vector.items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("method", "params"), WITH_SCOPES)
def test_a_group_is_merged_as_a_model_of_its_own(method: str, params: dict[str, str]) -> None:
    rule = {"match": "*.up", "weights": [1, 2, 3, 1, 2], "scale": 0.5}
    found = entries(merge_task_vectors(VECTORS, recipe(method, params=params, modules=[rule])))
    for end, plain in (
        ("up", recipe(method, params=params, weights=(1, 2, 3, 1, 2), scale=0.5)),
        ("q", recipe(method, params=params)),
    ):
        alone = [part(vector, end) for vector in VECTORS]
        if end == "q":
            alone = [TaskVector({**v.deltas, **part(w, "norm").deltas})
                     for v, w in zip(alone, VECTORS, strict=True)]  # fmt: skip
        wanted = entries(merge_task_vectors(alone, plain))
        assert same({name: found[name] for name in wanted}, wanted)


def test_a_gradient_differs_by_layer_and_matches_plain_recipes() -> None:
    found = entries(merge_task_vectors(VECTORS, recipe("ties", params={"density": [0.2, 0.8]})))
    for layer, density in enumerate((0.2, 0.5, 0.8)):
        plain = recipe("ties", params={"density": density})
        wanted = entries(merge_task_vectors(VECTORS, plain))
        for name in wanted:
            if name.startswith(f"layer.{layer}."):
                assert torch.equal(found[name], wanted[name])


SWAP = recipe(
    "mean",
    modules=[
        {"match": "*.up", "weights": [0, 1, 0]},
        {"match": "*.norm", "exclude": True},
        {"match": "layer.0.*", "scale": 0.5},
    ],
)


def test_layers_are_swapped_by_the_example() -> None:
    layers = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    ends = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    sources = [
        TaskVector({name: torch.full((2, 3), value) for name in [*layers, *ends]})
        for value in (1.0, 2.0)
    ]
    swapped = load_recipe(Path(__file__).parents[2] / "examples" / "layer_swapping.yaml")
    merged = entries(merge_task_vectors(sources, swapped))
    from_first = [*layers[:2], *ends[:2]]
    expected = {**dict.fromkeys(layers, 2.0), **dict.fromkeys(from_first, 1.0), ends[2]: 1.5}
    assert {name: tensor.unique().tolist() for name, tensor in merged.items()} == {
        name: [value] for name, value in expected.items()
    }


@pytest.mark.parametrize("budget_bytes", [1 << 30, 40_000])
@pytest.mark.parametrize(
    "fields",
    [
        SWAP.model_dump(exclude={"refactor"}),
        {"method": "ties", "params": {"scope": "model", "density": [0.3, 0.6]}, "modules": [
            {"match": "*.norm", "exclude": True}]},
        {"method": "iso_c", "modules": [{"match": "*.q", "scale": 2.0}]},
        {"method": "karcher", "modules": [{"match": "*.q", "weights": [1, 2, 3]}]},
    ],
)  # fmt: skip
def test_checkpoints_merge_as_task_vectors_do(
    fields: dict[str, Any], budget_bytes: int, save_model: Any, tmp_path: Path
) -> None:
    chosen = Recipe.model_validate(fields)
    base = drawn(99)
    folders = [
        save_model(NAMES[i], {n: base[n] + d for n, d in drawn(i).items()}) for i in (0, 1, 2)
    ]
    origin = save_model("base", base)
    merge_checkpoints(folders, chosen, tmp_path / "out", base=origin, budget_bytes=budget_bytes)
    found = load_file(tmp_path / "out" / "model.safetensors")
    stored = [load_file(folder / "model.safetensors") for folder in folders]
    vectors = [TaskVector({n: t[n] - base[n] for n in SHAPES}) for t in stored]
    merged = entries(merge_task_vectors(vectors, chosen))
    for name in SHAPES:
        torch.testing.assert_close(found[name], base[name] + merged[name], atol=1e-6, rtol=1e-6)
        if name.endswith("norm") and any(rule.exclude for rule in chosen.modules):
            assert torch.equal(found[name], base[name])


def test_excluded_modules_of_a_checkpoint_are_the_bases_and_are_not_read(
    save_model: Any, tmp_path: Path
) -> None:
    base = drawn(9)
    broken = {name: tensor.clone() for name, tensor in drawn(1).items()}
    broken["layer.0.norm"][0] = torch.nan
    model, origin = save_model("a", broken), save_model("base", base)
    kept = recipe("mean", modules=[{"match": "*.norm", "exclude": True}])
    merge_checkpoints([model], kept, tmp_path / "out", base=origin)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["layer.0.norm"], base["layer.0.norm"])
    with pytest.raises(ValueError, match="exclude keeps modules as the base has them; name it"):
        merge_checkpoints([model], kept, tmp_path / "none")


@pytest.fixture
def start(make_adapter: Callable[..., Adapter]) -> Adapter:
    return make_adapter(
        7, {"layer.0.q": (16, 8), "layer.1.q": (16, 8), "layer.1.up": (8, 16)}, head=True
    )


@pytest.mark.parametrize("method", ["mean", "ties", "iso_c", "fedit", "geometric_median"])
def test_adapters_leave_excluded_modules_as_they_started(
    method: str, start: Adapter, make_adapter: Callable[..., Adapter]
) -> None:
    adapters = [make_adapter(seed, near=start) for seed in range(3)]
    rules = [{"match": "*.up", "exclude": True}, {"match": "head.bias", "exclude": True}]
    result = merge(adapters, recipe(method, modules=rules), start=start)
    plain = merge(adapters, recipe(method), start=start)
    tensors, whole = result.adapter.tensors(), plain.adapter.tensors()
    for name, before in start.tensors().items():
        left = name.startswith("layer.1.up") or name == "head.bias"
        assert torch.equal(tensors[name], before) is left
        if not left and method in ("mean", "ties", "fedit"):
            assert torch.equal(tensors[name], whole[name])
    assert "layer.1.up" not in result.report.truncation
    assert result.report.coefficients is None
    assert result.report.cosine == plain.report.cosine


def test_without_a_start_excluded_modules_add_nothing(make_adapter: Callable[..., Adapter]) -> None:
    adapters = [make_adapter(seed) for seed in range(3)]
    rules = [{"match": "*.value", "exclude": True}]
    result = merge(adapters, recipe("mean", modules=rules)).adapter
    assert not result.lora["deep.value"].b_mr.any()
    assert result.lora["deep.value"].a_rn.any()
    assert result.lora["deep.query"].b_mr.any()


def test_coefficients_are_reported_where_all_modules_share_them(
    make_adapter: Callable[..., Adapter],
) -> None:
    adapters = [make_adapter(seed) for seed in range(2)]
    rule = {"match": "*.query", "scale": 0.5}
    assert merge(adapters, recipe("mean", modules=[rule])).report.coefficients == (0.5, 0.5)
    rule = {"match": "*.query", "weights": [0, 1]}
    found = merge(adapters, recipe("mean", modules=[rule]))
    assert found.report.coefficients is None
    swapped = found.adapter.lora["deep.query"].delta().dense()
    torch.testing.assert_close(swapped, adapters[1].lora["deep.query"].delta().dense())


def test_one_factor_follows_the_rules_of_its_module(
    start: Adapter, make_adapter: Callable[..., Adapter]
) -> None:
    adapters = []
    for seed in range(3):
        trained = make_adapter(seed, near=start).tensors("b")
        adapters.append(start.with_tensors({**start.tensors(), **trained}))
    rules = [{"match": "*.q", "weights": [0, 0, 1]}, {"match": "layer.1.up", "exclude": True}]
    merged = merge_one_factor(adapters, recipe("mean", modules=rules), "b", start=start).adapter
    assert torch.equal(merged.lora["layer.1.up"].b_mr, start.lora["layer.1.up"].b_mr)
    torch.testing.assert_close(merged.lora["layer.0.q"].b_mr, adapters[2].lora["layer.0.q"].b_mr)


def test_progress_counts_all_groups(make_adapter: Callable[..., Adapter]) -> None:
    seen: list[tuple[int, int]] = []
    rules = [{"match": "*.query", "exclude": True}]
    merge(
        [make_adapter(0), make_adapter(1)],
        recipe("lora_lego", modules=rules),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"modules": [{"match": "*.mlp"}]}, r"modules\.0\.match: '\*\.mlp' matches none of the 9"),
        ({"modules": [{"match": "*.up", "params": {"density": 3}}]},
         r"params\.density: .* got 3 \(module layer\.0\.up\)"),
        ({"params": {"density": [0.5, 3]}}, r"params\.density: .*\(module layer\.\d\.norm\)"),
        ({"modules": [{"match": "*.up", "weights": [1]}]},
         r"modules\.0\.weights: 1 for 5 contributions"),
        ({"modules": [{"match": "*.up", "weights": [0] * 5}]},
         r"divides by their sum.*\(module layer\.0\.up\)"),
    ],
)  # fmt: skip
def test_bad_rules_are_one_line(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        merge_task_vectors(VECTORS, recipe("ties", **fields))
    assert "\n" not in str(caught.value)
