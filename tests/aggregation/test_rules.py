"""What a recipe's rules and gradients say of each module."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from anabranch.aggregation import Recipe
from anabranch.aggregation.rules import Settings, settings_by_module

MODULES = [
    "model.embed.weight",
    *(f"model.layers.{i}.{part}" for i in range(3) for part in ("attn.q", "mlp.up")),
]


def of(**fields: Any) -> dict[str, Settings]:
    parts = settings_by_module(Recipe.model_validate({"method": "ties", **fields}), MODULES)
    return {module: settings for settings, modules in parts for module in modules}


def test_a_recipe_without_rules_is_one_group() -> None:
    (only,) = settings_by_module(Recipe(method="ties", scale=2, weights=(1, 3)), MODULES)
    assert only == (Settings({}, (1, 3), 2, False), tuple(MODULES))


def test_later_rules_win_key_by_key() -> None:
    found = of(
        params={"density": 0.2, "scope": "tensor", "inner": {"a": 1, "b": 2}},
        modules=[
            {"match": "*.layers.*", "scale": 2, "params": {"density": 0.5, "inner": {"b": 3}}},
            {"match": "*.mlp.*", "params": {"density": 0.9}, "exclude": True},
            {"match": "*.2.mlp.*", "exclude": False, "weights": [0, 1]},
        ],
    )
    plain = {"density": 0.2, "scope": "tensor", "inner": {"a": 1, "b": 2}}
    inside = {"density": 0.5, "scope": "tensor", "inner": {"a": 1, "b": 3}}
    assert found["model.embed.weight"] == Settings(plain, None, 1, False)
    assert found["model.layers.0.attn.q"] == Settings(inside, None, 2, False)
    up = {**inside, "density": 0.9}
    assert found["model.layers.1.mlp.up"] == Settings(up, None, 2, True)
    assert found["model.layers.2.mlp.up"] == Settings(up, (0, 1), 2, False)


def test_lists_of_numbers_are_gradients_over_the_layers() -> None:
    found = of(
        params={"density": [0.2, 0.6], "inner": {"deep": [0, 4]}, "words": ["a"]},
        weights=[1, [0, 1]],
        scale=[1, 2],
        modules=[{"match": "*.up", "weights": [[3, 1], None], "params": {"density": [1, 0.5, 0]}}],
    )
    middle = found["model.layers.1.attn.q"]
    assert middle.params == {"density": 0.4, "inner": {"deep": 2}, "words": ["a"]}
    assert (middle.weights, middle.scale) == ((1, 0.5), 1.5)
    assert found["model.embed.weight"].weights == (1, 0)
    assert found["model.layers.2.mlp.up"].weights == (1, 1)
    assert found["model.layers.1.mlp.up"].params["density"] == 0.5


def test_modules_with_equal_settings_stand_together() -> None:
    parts = settings_by_module(
        Recipe.model_validate(
            {"method": "mean", "modules": [{"match": "*.layers.[12].*", "scale": 1.0}]}
        ),
        MODULES,
    )
    assert len(parts) == 1


def test_a_factor_goes_by_the_name_of_its_module() -> None:
    recipe = Recipe.model_validate({"method": "mean", "modules": [{"match": "*.q", "scale": 2}]})
    ((first, modules),) = settings_by_module(recipe, ["layer.0.q.lora_B", "layer.1.q.lora_B"])
    assert (first.scale, len(modules)) == (2, 2)


def test_a_rule_that_matches_nothing_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"modules\.1\.match: '\*\.MLP\.\*' matches none of the 7 modules",
    ):
        of(modules=[{"match": "*"}, {"match": "*.MLP.*"}])


@pytest.mark.parametrize(
    "field",
    [
        {"scale": [1, 0]},
        {"scale": []},
        {"weights": [[]]},
        {"weights": [["a"]]},
        {"modules": [{"scale": 2}]},
        {"modules": [{"match": ""}]},
        {"modules": [{"match": "*", "density": 0.2}]},
        {"modules": [{"match": "*", "scale": float("inf")}]},
    ],
)
def test_what_makes_no_sense_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate({"method": "mean", **field})
