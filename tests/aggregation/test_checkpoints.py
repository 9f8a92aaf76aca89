"""Merging checkpoints from disk is merging their task vectors in memory, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anabranch.aggregation import Recipe, merge_checkpoints, merge_task_vectors, plan_merge
from anabranch.aggregation.engine.rows import ROW_BLOCK, WORKING_COPIES
from anabranch.aggregation.methods import BUILT_IN
from anabranch.vectors import TaskVector

SHAPES = {"deep.a": (150, 33), "deep.b": (37, 130), "head.bias": (130,), "conv": (40, 3, 5)}
SHAPES |= {"scalar": ()}
COUNT = 5
TIGHT = 2 * COUNT * 130 * 4 * WORKING_COPIES * ROW_BLOCK


def weights_of(seed: int, near: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if near is not None:
        drawn = {name: near[name] + 0.1 * tensor for name, tensor in drawn.items()}
    return {**drawn, "ids": torch.arange(7)}


BASE = weights_of(99)
STEP = weights_of(98, BASE)
"""Something the fine-tunes have in common, or Model Stock would rightly stay at the base."""
TUNED = [weights_of(seed, STEP) for seed in range(COUNT)]
FLOATING = sorted(SHAPES)


@pytest.fixture
def folders(save_model: Any) -> tuple[Path, list[Path]]:
    base = save_model("base", BASE, tokenizer={"model": {"vocab": {"a": 0}}})
    return base, [save_model(f"m{i}", t, shards=1 + i % 3) for i, t in enumerate(TUNED)]


def read(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def expected(recipe: Recipe, tuned: list[dict[str, Tensor]], **given: Any) -> dict[str, Tensor]:
    vectors = [TaskVector({n: t[n] - BASE[n] for n in FLOATING}) for t in tuned]
    merged = merge_task_vectors(vectors, recipe.model_copy(update={"scale": 1.0}), **given)
    return {n: BASE[n] + merged.deltas[n] * recipe.scale for n in FLOATING}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        m.name: (m.name, {"f": 0} if m.name == "bulyan" else {})
        for m in BUILT_IN
        if not m.factors and not m.needs_importance and not m.needs_names
    },
    "ties over the model": ("ties", {"scope": "model", "density": 0.3}),
    "karcher over the model": ("karcher", {"scope": "model"}),
    "pcb per tensor": ("pcb", {"scope": "tensor", "ratio": 0.4}),
}
"""Every method that needs no factors, and where it takes another way through the engine."""


ANY_BUDGET = [v for v in VARIANTS if v not in {m.name for m in BUILT_IN if m.matrices}]
"""Methods on matrices take theirs whole, whatever the budget."""


@pytest.mark.parametrize(
    ("variant", "budget_bytes"),
    [*((v, 2 << 30) for v in VARIANTS), *((v, TIGHT) for v in ANY_BUDGET)],
)
def test_from_disk_is_as_in_memory(
    variant: str, budget_bytes: int, folders: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    name, params = VARIANTS[variant]
    base, models = folders
    count = 2 if name == "slerp" else COUNT
    recipe = Recipe(method=name, params=params, scale=0.5, weights=(1, 2, 3, 4, 5)[:count])
    report = merge_checkpoints(
        models[:count], recipe, tmp_path / "out", base=base, budget_bytes=budget_bytes
    )
    found = read(tmp_path / "out")
    wanted = expected(recipe, TUNED[:count])
    assert sorted(found) == sorted([*FLOATING, "ids"])
    assert torch.equal(found["ids"], BASE["ids"])
    for module in FLOATING:
        assert torch.equal(found[module], wanted[module]), module
    assert any(not torch.equal(found[module], BASE[module]) for module in FLOATING)
    assert (report.merged, report.copied) == (len(FLOATING), 1)


def test_a_matrix_that_does_not_fit_the_budget_is_refused(
    folders: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, models = folders
    recipe = Recipe(method="tsv_m")
    needed = 150 * 33 * 4 * (COUNT + 32)
    wanted = (
        rf"budget_bytes: {needed - 1} cannot hold deep.a of 5 contributions as whole matrices, "
        rf"which tsv_m takes; allow at least {needed}$"
    )
    with pytest.raises(ValueError, match=wanted):
        merge_checkpoints(models, recipe, tmp_path / "o", base=base, budget_bytes=needed - 1)
    with pytest.raises(ValueError, match=wanted):
        plan_merge(models, recipe, base=base, budget_bytes=needed - 1)
    assert not (tmp_path / "o").exists()
    merge_checkpoints(models, recipe, tmp_path / "o", base=base, budget_bytes=needed)


def test_the_result_is_whole_and_in_the_bases_words(
    folders: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, models = folders
    out = tmp_path / "out"
    steps = []
    merge_checkpoints(
        models,
        Recipe(method="mean"),
        out,
        base=base,
        shard_bytes=25_000,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(done, 6) for done in range(1, 7)]
    assert (out / "config.json").read_text() == (base / "config.json").read_text()
    assert (out / "tokenizer.json").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(BASE)
    assert len(set(index["weight_map"].values())) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtypes_follow_the_base_or_what_is_asked(
    dtype: Any, save_model: Any, tmp_path: Path
) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in BASE.items()}
    config = {"model_type": "toy", "dtype": "float16"}
    base = save_model("base", half, config=config)
    models = [save_model(f"m{i}", TUNED[i], config=config) for i in range(2)]
    out = tmp_path / "out"
    merge_checkpoints(models, Recipe(method="mean"), out, base=base, dtype=dtype)
    stored = torch.float16 if dtype is None else getattr(torch, dtype)
    for name, tensor in read(out).items():
        if name == "ids":
            assert torch.equal(tensor, BASE["ids"])
            continue
        origin = half[name].float()
        mean = sum(0.5 * (TUNED[i][name] - origin) for i in range(2))
        assert torch.equal(tensor, (origin + mean).to(stored)), name
    said = json.loads((out / "config.json").read_text())["dtype"]
    assert said == (dtype or "float16")


def test_without_a_base_the_weights_themselves_are_merged(
    folders: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    _, models = folders
    recipe = Recipe(method="mean", weights=(1, 3))
    merge_checkpoints(models[:2], recipe, tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        wanted = TUNED[0][name] if name == "ids" else (TUNED[0][name] + 3 * TUNED[1][name]) / 4
        torch.testing.assert_close(tensor, wanted)


def test_methods_that_choose_entries_need_a_base(
    folders: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    _, models = folders
    for name in ("ties", "dare_linear", "sce", "iso_c"):
        reason = f"{name} chooses among the entries or directions of task vectors; name"
        refused(reason, models, None, tmp_path / "out", recipe=Recipe(method=name))
    report = merge_checkpoints(models, Recipe(method="karcher"), tmp_path / "out")
    assert report.warnings == (
        "no base: karcher merges the weights themselves, as if it were zero",
    )


def test_tensors_without_entries_stay(save_model: Any, tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3), "none": torch.empty(0, 4)}
    model = save_model("m", tensors)
    report = merge_checkpoints([model], Recipe(method="median"), tmp_path / "out", dtype="float16")
    found = read(tmp_path / "out")
    assert (report.merged, report.copied) == (1, 1)
    assert found["none"].shape == (0, 4)
    assert torch.equal(found["w"], torch.ones(3).half())


def test_a_lone_file_is_merged_too(folders: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = folders
    files = [base / "model.safetensors", models[0] / "model.safetensors"]
    out = tmp_path / "out"
    report = merge_checkpoints(files[1:], Recipe(method="mean"), out, base=files[0])
    torch.testing.assert_close(read(out)["deep.a"], TUNED[0]["deep.a"])
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert any("has no config.json" in warning for warning in report.warnings)


def refused(reason: str, models: list[Path], base: Path | None, out: Path, **given: Any) -> None:
    recipe = given.pop("recipe", Recipe(method="mean"))
    with pytest.raises(ValueError, match=reason) as caught:
        merge_checkpoints(models, recipe, out, base=base, **given)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_what_does_not_belong_together_is_refused(
    folders: tuple[Path, list[Path]], save_model: Any, tmp_path: Path
) -> None:
    base, models = folders
    out = tmp_path / "out"
    less = save_model("less", {n: t for n, t in BASE.items() if n != "conv"})
    refused(r"less: lacks conv, unlike the base .*base; save both", [models[0], less], base, out)
    more = save_model("more", {**BASE, "x": torch.ones(1), "y": torch.ones(1)})
    refused(r"more: holds x \(and 1 more\)", [more], base, out)
    wide = save_model("wide", {**BASE, "deep.a": torch.ones(151, 33)})
    refused(r"wide: deep\.a has shape \(151, 33\), in the base .*\(150, 33\)", [wide], base, out)
    other = save_model("other", {**BASE, "ids": torch.arange(7) + 1})
    refused(r"other: ids holds torch.int64 and differs from", [other], base, out)
    whole = save_model("whole", {**BASE, "scalar": torch.tensor(3)})
    refused(r"whole: scalar holds torch.int64, in the base .*float32", [whole], base, out)
    kind = save_model("kind", BASE, config={"model_type": "toy", "hidden_size": 38})
    refused(r"kind: config.json: hidden_size is 38, in the base .* it is 37", [kind], base, out)
    broken = save_model("broken", {**BASE, "conv": torch.full((40, 3, 5), torch.nan)})
    refused(r"broken/model.safetensors: conv holds numbers .* not finite", [broken], base, out)
    refused(r"fedit works on the factors", models, base, out, recipe=Recipe(method="fedit"))
    refused("nothing to merge", [], base, out)


def test_a_result_beyond_its_dtype_is_refused(save_model: Any, tmp_path: Path) -> None:
    base = save_model("base", {"w": torch.zeros(2).half()})
    model = save_model("m", {"w": torch.full((2,), 60000.0).half()})
    refused(
        "w leaves the range of torch.float16",
        [model] * 2,
        base,
        tmp_path / "out",
        recipe=Recipe(method="task_arithmetic"),
    )


def test_the_base_is_read_once_for_all_contributions(
    folders: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anabranch.vectors.safetensors_header import StoredTensor

    base, models = folders
    read_entries: dict[str, int] = {}
    fill = StoredTensor.fill

    def counted(self: StoredTensor, first: int, out_L: Tensor) -> None:
        key = self.path.parent.name
        read_entries[key] = read_entries.get(key, 0) + len(out_L)
        fill(self, first, out_L)

    monkeypatch.setattr(StoredTensor, "fill", counted)
    merge_checkpoints(models, Recipe(method="mean"), tmp_path / "out", base=base)
    floating = sum(BASE[name].numel() for name in FLOATING)
    # Each is also compared once in its integers; the base with every model, and copied.
    assert read_entries == {"base": floating + 7 * 6, **{f"m{i}": floating + 7 for i in range(5)}}
