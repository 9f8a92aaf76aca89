from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import anabranch.aggregation
from anabranch.aggregation import registry
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.recipe import Recipe, load_recipe
from anabranch.aggregation.registry import methods, register, resolve


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'method = "ties"\nscale = 0.5\n[params]\ndensity = 0.1\n[refactor]\nrank = 4\n'),
        (
            "b.toml",
            '[recipe]\nmethod = "ties"\nscale = 0.5\nparams.density = 0.1\nrefactor.rank = 4\n',
        ),
        ("c.yaml", "method: ties\nscale: 0.5\nparams: {density: 0.1}\nrefactor: {rank: 4}\n"),
    ],
)
def test_recipes_are_read(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    recipe = load_recipe(path)
    assert (recipe.method, recipe.scale, recipe.refactor.rank) == ("ties", 0.5, 4)
    method, config = resolve(recipe, str(path))
    assert method.name == "ties"
    assert config.model_dump() == {"density": 0.1, "scope": "tensor"}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.toml", "method = ", "broken toml"),
        ("a.yaml", "method: [", "broken yaml"),
        ("a.yaml", "- ties", "holds no table"),
        ("a.yaml", "recipe: 3", "recipe: must be a table of keys, or"),
        ("a.yaml", "method: ties\nscale: -1", "scale: Input should be greater than 0, got -1"),
        ("a.yaml", "method: ties\nspeed: 9", "speed: Extra inputs"),
        ("a.yaml", "method: ties\nrefactor: {rank: 0}", "refactor.rank: .* got 0"),
    ],
)
def test_bad_recipes_name_file_key_and_reason(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{name}: {reason}") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: cannot be read"):
        load_recipe(tmp_path / "none.toml")


def test_unknown_methods_and_parameters_name_the_choice() -> None:
    with pytest.raises(
        ValueError, match=r"r.toml: method: 'tiez' .* choose from breadcrumbs, .*ties"
    ):
        resolve(Recipe(method="tiez"), "r.toml")
    with pytest.raises(ValueError, match=r"r.toml: params.density: .* less than .* got 7"):
        resolve(Recipe(method="ties", params={"density": 7}), "r.toml")
    with pytest.raises(ValueError, match=r"params.dense"):
        resolve(Recipe(method="ties", params={"dense": 1}))


@pytest.mark.parametrize("field", [{"scale": math.inf}, {"weights": (1.0, math.nan)}])
def test_numbers_that_are_none_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Recipe(method="mean", **field)


def test_a_name_stands_for_one_method() -> None:
    with pytest.raises(ValueError, match="'mean' is registered twice"):
        register([*BUILT_IN, BUILT_IN[0]])
    assert list(methods())[: len(BUILT_IN)] == [method.name for method in BUILT_IN]


def test_other_packages_add_methods_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> MergeMethod:
            return replace(BUILT_IN[0], name="theirs")

    def points(*, group: str) -> list[Point]:
        return [Point()] if group == "anabranch.merge_methods" else []

    monkeypatch.setattr(registry, "entry_points", points)
    methods.cache_clear()
    try:
        method, _ = resolve(Recipe(method="theirs"))
        assert method.name == "theirs"
    finally:
        methods.cache_clear()


def test_every_field_of_every_method_is_described() -> None:
    for method in BUILT_IN:
        assert isinstance(method, MergeMethod)
        assert issubclass(method.config, MethodConfig)
        assert method.config.__doc__
        for name, field in method.config.model_fields.items():
            assert field.description, f"{method.name}.{name}"


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, anabranch.aggregation.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_offers_what_it_lists() -> None:
    for name in anabranch.aggregation.__all__:
        assert getattr(anabranch.aggregation, name) is not None
    assert anabranch.aggregation.merge.__name__ == "merge_adapters"
    with pytest.raises(AttributeError, match="has no attribute 'blend'"):
        anabranch.aggregation.blend  # noqa: B018
