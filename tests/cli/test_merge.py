"""``anabranch merge`` on checkpoints, by mergekit's YAML, planned, and without some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from anabranch.vectors import Adapter, LoraFactors, LowRank
from anabranch.vectors.fisher_file import write_fisher
from anabranch.vectors.peft_folder import read_adapter, write_adapter

TENSORS = {"a": torch.zeros(8, 4), "b": torch.zeros(4)}


@pytest.fixture
def models(save_model: Any) -> dict[str, Path]:
    made = {"base": save_model("base", TENSORS)}
    for name, step in (("north", 1.0), ("south", 2.0), ("east", 6.0)):
        made[name] = save_model(name, {key: tensor + step for key, tensor in TENSORS.items()})
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "mean"\n')
    return path


def entry(folder: Path) -> float:
    merged = load_file(folder / "model.safetensors")
    values = torch.cat([tensor.flatten() for tensor in merged.values()])
    assert bool((values == values[0]).all())
    return float(values[0])


def test_checkpoints_are_merged_against_their_base(
    run: Any, models: dict[str, Path], recipe: Path, tmp_path: Path
) -> None:
    inputs = [models[name] for name in ("north", "south", "east")]
    out = tmp_path / "out"
    code, said, err = run("merge", recipe, *inputs, "--base", models["base"], "-o", out)
    assert (code, err) == (0, "")
    assert "3 checkpoints by mean, 2 tensors merged, 0 copied, 144 B" in said
    assert entry(out) == 3.0
    assert (out / "config.json").exists()
    code, said, _ = run(
        "merge", recipe, *inputs, "--base", models["base"], "-o", tmp_path / "b", "--json"
    )
    assert json.loads(said)["report"]["merged"] == 2


def test_shards_are_as_large_as_asked(
    run: Any, save_model: Any, recipe: Path, tmp_path: Path
) -> None:
    large = {name: torch.ones(400, 500) for name in "abc"}
    folder = save_model("large", large)
    code, _, _ = run("merge", recipe, folder, "-o", tmp_path / "out", "--shard-mb", "1")
    assert code == 0
    assert len(list((tmp_path / "out").glob("model-0000*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("name", ["east", "path"])
def test_an_input_is_withdrawn(
    name: str, run: Any, models: dict[str, Path], recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text('method = "mean"\nweights = [1, 3, 9]\n')
    inputs = [models[name] for name in ("north", "south", "east")]
    wanted = models["east"] if name == "path" else name
    out = tmp_path / "out"
    code, said, _ = run("merge", recipe, *inputs, "--without", wanted, "-o", out)
    assert code == 0
    assert "2 checkpoints" in said
    assert entry(out) == (1 + 3 * 2) / 4


def test_adapters_are_withdrawn_with_their_weights(run: Any, recipe: Path, tmp_path: Path) -> None:
    factors = {"q": LoraFactors(torch.ones(1, 6), torch.ones(5, 1), 1.0)}
    for name, step in (("x", 1.0), ("y", 4.0), ("z", 7.0)):
        one = {"q": LoraFactors(factors["q"].a_rn, factors["q"].b_mr * step, 1.0)}
        write_adapter(Adapter(one), tmp_path / name)
    recipe.write_text('method = "mean"\nweights = [1, 5, 3]\n')
    inputs = [tmp_path / name for name in "xyz"]
    code, _, err = run("merge", recipe, *inputs, "--without", "y", "-o", tmp_path / "out")
    assert code == 0, err
    merged = read_adapter(tmp_path / "out").lora["q"].delta().dense()
    torch.testing.assert_close(merged, torch.full((5, 6), (1 + 3 * 7) / 4))


def test_a_plan_says_what_would_be_done_and_does_nothing(
    run: Any, models: dict[str, Path], recipe: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    inputs = [models["north"], models["south"]]
    code, said, err = run("merge", recipe, *inputs, "--base", models["base"], "--plan")
    assert (code, err) == (0, "")
    for line in ("2 checkpoints by mean, scope entry", "2 merged", "1 at most", "writes  144 B"):
        assert line in said
    assert sorted(tmp_path.iterdir()) == before
    code, said, _ = run("merge", recipe, *inputs, "--base", models["base"], "--plan", "--json")
    facts = json.loads(said)
    assert (facts["kind"], facts["output_bytes"], facts["warnings"]) == ("checkpoints", 144, [])


def mergekit(path: Path, models: dict[str, Path], **changes: Any) -> Path:
    data = {
        "merge_method": "ties",
        "base_model": str(models["base"]),
        "models": [
            {"model": str(models[name]), "parameters": {"weight": weight}}
            for name, weight in (("north", 1), ("south", 3))
        ],
        "parameters": {"density": 1.0, "int8_mask": True},
        **changes,
    }
    path.write_text(yaml.safe_dump(data))
    return path


def test_mergekits_yaml_names_its_models(run: Any, models: dict[str, Path], tmp_path: Path) -> None:
    path = mergekit(tmp_path / "m.yml", models)
    code, said, err = run("merge", path, "-o", tmp_path / "out")
    assert code == 0
    assert "2 checkpoints by ties" in said
    assert err == "warning: int8_mask: is ignored, masks take no extra memory here\n"
    assert entry(tmp_path / "out") == (1 + 3 * 2) / 4
    code, said, _ = run("merge", path, "--plan", "--json", "--without", "south")
    assert json.loads(said)["names"] == [str(models["north"])]


BAD = {
    "no out": ("{recipe} {north}", "nowhere to write to; name a new folder with --out"),
    "nothing": ("{recipe} -o {out}", "nothing to merge"),
    "no such device": ("{recipe} {north} --device gpu -o {out}", "device: gpu is none that can"),
    "unknown name": ("{recipe} {north} {south} --without west -o {out}", "'west' is none of"),
    "all gone": ("{recipe} {north} --without north -o {out}", "leaves none of"),
    "another shape": (
        "{recipe} {north} {wide} --base {base} --plan",
        "a has shape (9, 4), in the base",
    ),
    "arguments of mergekit": ("{yaml} {north} -o {out}", "m.yml: names its models itself"),
    "mergekit's filter": ("{odd} -o {out}", "is no value with a filter; give value, and filter"),
    "mixed": ("{recipe} {north} {lora} -o {out}", "not both at once"),
    "base for adapters": ("{recipe} {lora} --base {base} -o {out}", "--base is for checkpoints"),
    "not finite": ("{recipe} {nan} -o {out}", "nan/model.safetensors: a holds numbers"),
    "too small": ("{recipe} {long} {long} --budget-mb 16 -o {out}", "budget_bytes: 16000000"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, as_json: bool, run: Any, models: dict[str, Path], recipe: Path, save_model: Any
) -> None:
    tmp = recipe.parent
    places = {name: str(path) for name, path in models.items()}
    places |= {"recipe": str(recipe), "out": str(tmp / "out"), "lora": str(tmp / "lora")}
    places["yaml"] = str(mergekit(tmp / "m.yml", models))
    filtered = {"density": [{"filter": "mlp"}]}
    places["odd"] = str(mergekit(tmp / "odd.yml", models, parameters=filtered))
    places["wide"] = str(save_model("wide", {**TENSORS, "a": torch.ones(9, 4)}))
    places["nan"] = str(save_model("nan", {"a": torch.full((3,), torch.nan)}))
    places["long"] = str(save_model("long", {"a": torch.ones(1, 200_000)}))
    write_adapter(
        Adapter({"q": LoraFactors(torch.ones(1, 6), torch.ones(5, 1), 1.0)}), tmp / "lora"
    )
    words, expected = BAD[case]
    if case == "too small":
        recipe.write_text('method = "median"\n')
    code, out, err = run("merge", *words.format(**places).split(), *(["--json"] if as_json else []))
    assert (code, out) == (2, ""), err
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert not (tmp / "out").exists()
    assert not [path for path in tmp.iterdir() if path.name.startswith(".")]


def test_fishers_lie_beside_the_adapters_they_weigh(run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "fisher.toml"
    recipe.write_text('method = "fisher"\n')
    folders = []
    for step, sure_of in ((1.0, 0), (3.0, 1)):
        folder = tmp_path / f"lora-{sure_of}"
        lora = {"q": LoraFactors(torch.ones(1, 4), torch.full((2, 1), step), 1.0)}
        write_adapter(Adapter(lora), folder)
        folders.append(folder)
    for option in (("--plan",), ("-o", tmp_path / "out")):
        code, _, err = run("merge", recipe, *folders, *option)
        assert code == 2
        assert f"fisher: {folders[0]} ships no Fisher; put fisher.safetensors beside" in err
    for row, folder in enumerate(folders):
        rows_2 = torch.tensor([[1.0], [0.0]]) if row == 0 else torch.tensor([[0.0], [1.0]])
        write_fisher({"q": LowRank(rows_2, torch.ones(1, 4))}, folder)
    code, said, _ = run("merge", recipe, *folders, "--plan", "--json")
    assert code == 0
    assert json.loads(said)["read_bytes"] == 2 * 4 * (6 + 6)
    code, _, err = run("merge", recipe, *folders, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    merged = read_adapter(tmp_path / "out").lora["q"].delta().dense()
    wanted = torch.tensor([[1.0], [3.0]]).expand(2, 4)
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)


def test_who_stands_out_is_named_with_what_was_done(run: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folders = []
    for index in range(6):
        size = 50.0 if index == 4 else 1.0
        factors = LoraFactors(
            torch.randn(4, 16, generator=generator),
            size * torch.randn(24, 4, generator=generator),
            4.0,
        )
        folders.append(tmp_path / f"client-{index}")
        write_adapter(Adapter({"layer.query": factors}), folders[-1])
    recipe = tmp_path / "careful.toml"
    recipe.write_text('method = "mean"\n[suspicion]\naction = "exclude"\nsignals = ["energy"]\n')
    code, said, err = run("merge", recipe, *folders, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    lines = [line for line in said.splitlines() if line.startswith("stood out: ")]
    assert len(lines) == 1
    assert "client-4 (exclude): " in lines[0]
    assert "times the cohort's median" in lines[0]
    code, said, _ = run("merge", recipe, *folders, "-o", tmp_path / "json", "--json")
    assert json.loads(said)["report"]["suspicion"]["findings"][0]["action"] == "exclude"
    code, said, _ = run("merge", recipe, *folders, "--without", folders[4], "-o", tmp_path / "rest")
    assert code == 0
    assert "nobody stood out" in said
    merged, rest = (read_adapter(tmp_path / name) for name in ("out", "rest"))
    assert merged.hash() == rest.hash()
