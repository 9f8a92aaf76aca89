from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from anabranch.aggregation.recipe import ModuleRule, Recipe
from anabranch.coordinator.federation import FederationConfig, load_federation, write_federation


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = FederationConfig(
        name="f",
        run="r",
        quorum=3,
        recipe=Recipe(
            method="ties",
            params={"density": [0.3, 0.5]},
            modules=(ModuleRule(match="*.query", exclude=True, scale=(1.0, 0.5)),),
        ),
        train={"steps": 5, "learning_rate": 2e-3},
    )
    write_federation(config, tmp_path)
    assert load_federation(tmp_path) == config


def test_a_wrong_value_is_one_line_with_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('name = "f"\nrun = "r"\nquorum = 0\n')
    with pytest.raises(ValueError, match=r"federation\.toml: quorum: .*got 0") as caught:
        load_federation(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"federation\.toml: cannot be read"):
        load_federation(tmp_path)


@pytest.mark.parametrize("refactor", [{"kind": "stack"}, {"rank": 4}])
def test_a_recipe_that_changes_the_rank_is_refused(refactor: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="keeps its rank"):
        FederationConfig(name="f", run="r", recipe={"method": "mean", "refactor": refactor})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"weights": [1.0, 2.0]}, {"modules": [{"match": "*", "weights": [1.0, 2.0]}]}]
)
def test_weights_by_position_are_refused(fields: dict[str, object]) -> None:
    recipe = Recipe.model_validate({"method": "mean", **fields})
    with pytest.raises(ValidationError, match="by position"):
        FederationConfig(name="f", run="r", recipe=recipe)


def test_updates_of_ranks_are_for_votes_on_one_factor(tmp_path: Path) -> None:
    vote, ranks = Recipe(method="rank_vote"), {"name": "ranks"}
    given = {"name": "f", "run": "r", "codec": ranks, "recipe": vote, "trains": "b"}
    config = FederationConfig.model_validate(given)
    write_federation(config, tmp_path)
    assert load_federation(tmp_path) == config
    for change, reason in (
        ({"recipe": Recipe(method="mean")}, "mean reads sizes"),
        ({"recipe": Recipe(method="sign_vote")}, "sign_vote reads sizes"),
        ({"trains": "both"}, 'set trains = "b"'),
        ({"trains": "alternate"}, 'set trains = "b"'),
        ({"down_codec": ranks}, "no change"),
    ):
        with pytest.raises(ValidationError, match=reason) as caught:
            FederationConfig.model_validate({**given, **change})
        assert caught.value.errors()[0]["loc"][-1] == "name"
