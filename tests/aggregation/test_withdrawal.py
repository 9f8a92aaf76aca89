"""A contribution that is withdrawn might never have been there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anabranch.aggregation import Recipe, merge, merge_checkpoints, merge_task_vectors
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.withdrawal import remaining
from anabranch.vectors import Adapter, TaskVector

NAMES = ["a", "b", "c", "d", "e", "f"]
WEIGHTS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)


def enough(method: str) -> int:
    """SLERP goes between two; the others withstand what they must with five."""
    return 3 if method == "slerp" else 6


@pytest.mark.parametrize("method", [m.name for m in BUILT_IN if not m.needs_importance])
@pytest.mark.parametrize("gone", [0, 1, -1])
def test_the_merge_is_the_one_that_never_had_it(
    method: str, gone: int, make_adapter: Callable[..., Adapter]
) -> None:
    count = enough(method)
    adapters = [make_adapter(seed) for seed in range(count)]
    names, weights = NAMES[:count], WEIGHTS[:count]
    params = {"bulyan": {"f": 0}, "fltrust": {"root": "c"}}.get(method, {})
    recipe = Recipe(method=method, params=params, weights=weights)
    rest = [index for index in range(count) if index != gone % count]
    found = merge(adapters, recipe, names=names, without=[names[gone]])
    never = merge(
        [adapters[index] for index in rest],
        recipe,
        names=[names[index] for index in rest],
        weights=[weights[index] for index in rest],
    )
    assert found.report == never.report
    assert found.adapter.hash() == never.adapter.hash()


def test_task_vectors_and_checkpoints_are_withdrawn_too(save_model: Any, tmp_path: Path) -> None:
    tensors = [torch.randn(20, 9, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    recipe = Recipe(method="dare_ties", params={"density": 0.5}, weights=(1, 2, 3, 4))
    kept, weights = tensors[::2], (1, 3)
    vectors = [TaskVector({"w": tensor}) for tensor in tensors]
    found = merge_task_vectors(vectors, recipe, names=NAMES[:4], without=["d", "b"])
    never = merge_task_vectors([TaskVector({"w": t}) for t in kept], recipe, weights=weights)
    assert torch.equal(found.deltas["w"], never.deltas["w"])
    folders = [save_model(name, {"w": t}) for name, t in zip(NAMES, tensors, strict=False)]
    base = save_model("base", {"w": torch.zeros(20, 9)})
    gone = ["d", str(folders[1])]
    report = merge_checkpoints(folders, recipe, tmp_path / "out", base=base, without=gone)
    assert report.names == (str(folders[0]), str(folders[2]))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["w"], never.deltas["w"])


def test_rules_lose_the_weights_of_who_is_gone() -> None:
    rule = {"match": "*", "weights": [1, None, [0, 1]]}
    recipe = Recipe.model_validate({"method": "mean", "weights": [[1, 2], 3, 4], "modules": [rule]})
    left = remaining(["a", "b", "c"], ["b"], recipe).recipe
    assert left.weights == ((1, 2), 4)
    assert left.modules[0].weights == (1, (0, 1))
    given = remaining(["a", "b", "c"], ["a"], recipe, [5, 6, 7]).recipe
    assert given.weights == (6, 7)
    assert given.modules[0].weights == (None, (0, 1))
    with pytest.raises(ValueError, match=r"modules\.0\.weights: 3 for 2 contributions"):
        remaining(["a", "b"], ["a"], recipe, [1, 2])


def test_names_are_folder_names_or_whole_paths() -> None:
    recipe = Recipe(method="mean", weights=(1, 2, 3))
    paths = ["x/north", "y/north", "y/south/"]
    assert remaining(paths, ["south"], recipe).indices == (0, 1)
    assert remaining(paths, ["y/north"], recipe).recipe.weights == (1, 3)
    assert remaining(paths, ["y/south", "./x/north"], recipe).names == ("y/north",)
    with pytest.raises(ValueError, match="'north' may be any of x/north, y/north; give its whole"):
        remaining(paths, ["north"], recipe)
    with pytest.raises(ValueError, match="'east' is none of x/north, y/north, y/south/; name one"):
        remaining(paths, ["east"], recipe)
    with pytest.raises(ValueError, match="leaves none of"):
        remaining(["a"], ["a"], Recipe(method="mean"))
    with pytest.raises(ValueError, match="weights: 3 for 2 contributions"):
        remaining(["a", "b"], ["a"], recipe)
    assert remaining(["a", "b"], [], Recipe(method="mean")).recipe.weights is None
