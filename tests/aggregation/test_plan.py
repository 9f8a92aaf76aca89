"""A plan says what a merge then does, and refuses what it would, before a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge, merge_checkpoints, plan_merge
from anabranch.aggregation.engine.rows import ROW_BLOCK, WORKING_COPIES
from anabranch.aggregation.planning.cost import COUNTER_BYTES
from anabranch.aggregation.recipe import Refactor
from anabranch.aggregation.whole import WHOLE_COPIES
from anabranch.vectors import Adapter, safetensors_header
from anabranch.vectors.peft_folder import adapter_layout, read_adapter, write_adapter

TIGHT = 2 * 3 * 64 * 4 * WORKING_COPIES * ROW_BLOCK
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}),
    ("karcher", {}),
    ("median", {}),
    ("ties", {}),
    ("ties", {"scope": "model"}),
    ("sce", {}),
    ("pcb", {}),
    ("tsv_m", {}),
    ("rank_vote", {}),
    ("opcm", {}),
]
RULES = [{"match": "[ab]", "scale": 2}, {"match": "c", "exclude": True}]


@pytest.fixture
def models(save_model: Any) -> list[Path]:
    def draw(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"a": (300, 64), "b": (64,), "c": (2, 64)}
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {**drawn, "ids": torch.arange(4)}

    return [save_model(name, draw(seed)) for seed, name in enumerate(["base", "x", "y", "z"])]


@pytest.fixture
def adapters(tmp_path: Path, make_adapter: Callable[..., Adapter]) -> list[Path]:
    folders = [tmp_path / f"lora-{name}" for name in "xyz"]
    for seed, folder in enumerate(folders):
        write_adapter(make_adapter(seed, rank=3 + seed), folder)
    return folders


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a plan reads no tensor")

    monkeypatch.setattr(safetensors_header.StoredTensor, "fill", read)
    monkeypatch.setattr("anabranch.vectors.safetensors_file.safe_open", read)


@pytest.mark.parametrize("budget_bytes", [2 << 30, TIGHT])
@pytest.mark.parametrize(("method", "params"), METHODS)
@pytest.mark.parametrize("rules", [[], RULES])
def test_bytes_read_and_written_are_those_planned(
    rules: list[dict[str, Any]],
    method: str,
    params: dict[str, Any],
    budget_bytes: int,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.model_validate({"method": method, "params": params, "modules": rules})
    base, *tuned = models
    if method in ("tsv_m", "opcm"):
        budget_bytes = max(budget_bytes, 300 * 64 * 4 * (3 + 32))
    if method == "rank_vote":
        budget_bytes = max(budget_bytes, 2 * 300 * 64 * 4 * WHOLE_COPIES)
    plan = plan_merge(tuned, recipe, base=base, budget_bytes=budget_bytes)
    read_bytes = []
    fill = safetensors_header.StoredTensor.fill

    def counted(self: safetensors_header.StoredTensor, first: int, out_L: Tensor) -> None:
        read_bytes.append(len(out_L) * self.dtype.itemsize)
        fill(self, first, out_L)

    monkeypatch.setattr(safetensors_header.StoredTensor, "fill", counted)
    report = merge_checkpoints(
        tuned, recipe, tmp_path / "out", base=base, budget_bytes=budget_bytes
    )
    # The base may be at hand from the last pass when the result is added to it.
    assert 0.79 * plan.read_bytes <= sum(read_bytes) <= plan.read_bytes
    assert plan.output_bytes == report.size_bytes
    assert (plan.modules, plan.copied) == (report.merged, report.copied)
    assert plan.memory_bytes <= budget_bytes + 3 * COUNTER_BYTES
    assert plan.names == report.names


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("kind", ["checkpoints", "adapters"])
def test_ranks_share_what_one_would_do(kind: str, models: list[Path], adapters: list[Path]) -> None:
    recipe = Recipe(method="ties", params={"scope": "model"})
    given = {"base": models[0]} if kind == "checkpoints" else {}
    inputs = models[1:] if kind == "checkpoints" else adapters
    budget_bytes = 1 << 20
    alone = plan_merge(inputs, recipe, **given, budget_bytes=budget_bytes)
    shared = plan_merge(inputs, recipe, **given, budget_bytes=2 * budget_bytes, ranks=2)
    assert len(alone.ranks) == 1
    assert len(shared.ranks) == 2
    modules = alone.modules + alone.copied
    assert [sum(rank.modules for rank in plan.ranks) for plan in (alone, shared)] == [modules] * 2
    assert shared.output_bytes == alone.output_bytes
    if kind == "checkpoints":
        assert shared.read_bytes == alone.read_bytes
        # The one large matrix, and all else.
        assert [rank.modules for rank in shared.ranks] == [1, 3]
        assert shared.ranks[0].output_bytes == 300 * 64 * 4
    else:
        # Every rank reads the adapters, and the first writes.
        assert shared.read_bytes == 2 * alone.read_bytes
        assert shared.ranks[1].output_bytes == 0
    counters = 3 * len(inputs) * COUNTER_BYTES
    assert all(rank.memory_bytes <= budget_bytes + counters for rank in shared.ranks)
    assert shared.memory_bytes == sum(rank.memory_bytes for rank in shared.ranks)


@pytest.mark.parametrize("method", ["ties", "tsv_m"])
def test_a_budget_too_small_for_ranks_is_said_of_all_of_them(
    method: str, models: list[Path]
) -> None:
    def plan(budget_bytes: int) -> None:
        plan_merge(
            models[1:], Recipe(method=method), base=models[0], budget_bytes=budget_bytes, ranks=2
        )

    with pytest.raises(ValueError, match="budget_bytes: 4000 over 2 ranks cannot") as refused:
        plan(4000)
    needed = int(str(refused.value).split()[-1])
    plan(needed)
    with pytest.raises(ValueError, match=f"allow at least {needed}"):
        plan(needed - 2)


@pytest.mark.usefixtures("no_reads")
def test_a_plan_of_checkpoints_reads_headers_only(models: list[Path]) -> None:
    base, *tuned = models
    plan = plan_merge(tuned, Recipe(method="ties"), base=base, without=["y"])
    entries = 300 * 64 + 64 + 2 * 64
    assert plan.kind == "checkpoints"
    assert plan.names == (str(tuned[0]), str(tuned[2]))
    assert (plan.method, plan.scope, plan.modules, plan.copied) == ("ties", "tensor", 3, 1)
    assert plan.output_bytes == 4 * entries + 8 * 4
    narrow = plan_merge(tuned, Recipe(method="mean"), base=base, dtype="bfloat16")
    assert narrow.output_bytes == 2 * entries + 8 * 4
    assert narrow.passes == 1


@pytest.mark.usefixtures("no_reads")
def test_a_plan_shows_the_groups(models: list[Path], adapters: list[Path]) -> None:
    base, *tuned = models
    recipe = Recipe.model_validate({"method": "ties", "modules": RULES})
    scaled, kept = plan_merge(tuned, recipe, base=base, weights=[1, 2, 3]).groups
    assert (scaled.modules, scaled.first, scaled.scale, scaled.excluded) == (2, "a", 2, False)
    assert (kept.modules, kept.first, kept.scale, kept.excluded) == (1, "c", 1, True)
    assert scaled.params == {"density": 0.2, "scope": "tensor"}
    assert scaled.weights == (1, 2, 3)
    mine = Recipe.model_validate({"method": "ties", "modules": [{"match": "*.query", "scale": 2}]})
    assert [group.first for group in plan_merge(adapters, mine).groups] == [
        "deep.query",
        "deep.value",
    ]
    refused(r"modules\.0\.match: '\[ab\]' matches none of the 2 modules", adapters, recipe)


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("kind", ["svd", "stack"])
def test_a_plan_of_adapters_reads_headers_only(kind: Any, adapters: list[Path]) -> None:
    plan = plan_merge(adapters, Recipe(method="mean", refactor=Refactor(kind=kind)))
    assert plan.kind == "adapters"
    assert (plan.modules, plan.passes, plan.warnings) == (2, 1, ())
    rank = 5 if kind == "svd" else 3 + 4 + 5
    assert plan.output_bytes == rank * (40 + 24 + 24 + 70) * 4
    assert plan.read_bytes == 12 * (40 + 24 + 24 + 70) * 4


def test_what_is_planned_for_adapters_is_written(adapters: list[Path]) -> None:
    rule = {"match": "*.value", "exclude": True}
    recipe = Recipe.model_validate({"method": "ties", "modules": [rule]})
    plan = plan_merge(adapters, recipe)
    adapter = merge([read_adapter(folder) for folder in adapters], recipe).adapter
    written = sum(t.numel() * t.element_size() for t in adapter.tensors().values())
    assert plan.output_bytes == written


def test_a_layout_is_the_adapter_without_its_numbers(adapters: list[Path]) -> None:
    layout, adapter = adapter_layout(adapters[1]), read_adapter(adapters[1])
    assert layout.base_hash == adapter.base_hash
    assert layout.peft == adapter.peft
    for name, tensor in adapter.tensors().items():
        mine = layout.tensors()[name]
        assert (mine.shape, mine.dtype, mine.device.type) == (tensor.shape, tensor.dtype, "meta")


def refused(reason: str, inputs: list[Path], recipe: Recipe | None = None, **given: Any) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        plan_merge(inputs, recipe or Recipe(method="mean"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_reads")
def test_adapters_and_checkpoints_never_mix(
    adapters: list[Path], save_model: Any, tmp_path: Path
) -> None:
    model = save_model("model", {"w": torch.ones(2)})
    refused("model: holds no adapter_config.json, and .*x does", [*adapters, model])
    refused("--base is for checkpoints", adapters, base=model)
    refused("--start is for adapters", [model], start=adapters[0])
    refused("none: is not there; name an adapter folder", [adapters[0], tmp_path / "none"])
    (tmp_path / "none").mkdir()
    refused("none: is no adapter folder .* and no checkpoint", [tmp_path / "none"])
    refused("nothing to merge", [])


@pytest.mark.usefixtures("no_reads")
def test_what_a_method_refuses_is_refused_by_the_plan(
    adapters: list[Path], models: list[Path]
) -> None:
    base, *tuned = models
    for inputs, given in ((adapters, {}), (tuned, {"base": base})):
        refused("multi_krum: f: 1 malicious need", inputs, Recipe(method="multi_krum"), **given)
        refused("slerp: goes between two", inputs, Recipe(method="slerp"), **given)
        # Two by two, three are two mixtures.
        paired = {"method": "multi_krum", "params": {"f": 0}, "pre": [{"name": "bucketing"}]}
        refused("at least 3 .* there are 2", inputs, Recipe.model_validate(paired), **given)
        mixed = {"method": "mean", "pre": [{"name": "nnm", "params": {"f": 2}}]}
        refused("nnm: f: 2 malicious of 3", inputs, Recipe.model_validate(mixed), **given)
        refused("weights: 2 for 3", inputs, Recipe(method="mean", weights=(1, 2)), **given)
        refused(
            "budget_bytes: 1000 cannot", inputs, Recipe(method="ties"), budget_bytes=1000, **given
        )
    refused("fedit works on the factors", tuned, Recipe(method="fedit"), base=base)
    stack = Recipe(method="ties", refactor=Refactor(kind="stack"))
    refused("refactor.kind: stack", adapters, stack)
    refused(r"refactor\.rank: 99 is above", adapters, Recipe(method="mean", refactor={"rank": 99}))


@pytest.mark.usefixtures("no_reads")
def test_adapters_of_different_bases_are_refused(
    tmp_path: Path, make_adapter: Callable[..., Adapter]
) -> None:
    def written(name: str, base: str | None, base_hash: str | None = None, **shapes: Any) -> Path:
        adapter = make_adapter(1, shapes or None)
        peft = {} if base is None else {"base_model_name_or_path": base}
        write_adapter(replace(adapter, base_hash=base_hash, peft=peft), tmp_path / name)
        return tmp_path / name

    first = written("first", "org/llama")
    refused(
        "second: base_model_name_or_path: is 'org/qwen', in .*first it is 'org/llama'",
        [first, written("second", "org/qwen")],
    )
    moved = plan_merge([first, written("moved", "/models/llama")], Recipe(method="mean"))
    assert len(moved.warnings) == 1
    assert "'/models/llama'" in moved.warnings[0]
    hashes = [written("h1", "org/llama", "aa"), written("h2", "renamed", "aa")]
    assert plan_merge(hashes, Recipe(method="mean")).warnings == ()
    refused("h3 was trained on base bb, .*h1 on aa", [hashes[0], written("h3", None, "bb")])
    refused(
        "other and .*first change different modules, such as deep, deep",
        [first, written("other", None, deep=(3, 4))],
    )
    wide = {"deep.query": (41, 24), "deep.value": (24, 70)}
    refused(r"wide: module deep.query has shape \(41, 24\)", [first, written("wide", None, **wide)])
    refused(
        r"headed and .*first change different modules, such as a",
        [first, first],
        start=written("headed", None, a=(2, 2)),
    )


def tokenizer(vocab: dict[str, int], added: dict[str, int] | None = None) -> dict[str, Any]:
    tokens = [{"content": token, "id": number} for token, number in (added or {}).items()]
    return {"model": {"vocab": vocab}, "added_tokens": tokens}


@pytest.mark.usefixtures("no_reads")
def test_tokenizers_are_compared(save_model: Any) -> None:
    tensors = {"w": torch.ones(2)}
    vocab = {"a": 0, "b": 1}
    base = save_model("base", tensors, tokenizer=tokenizer(vocab, {"<s>": 2}))
    same = save_model("same", tensors, tokenizer=tokenizer(vocab, {"<s>": 2}))
    none = save_model("none", tensors)
    assert plan_merge([same, none], Recipe(method="mean"), base=base).warnings == ()
    chat = save_model(
        "chat",
        tensors,
        tokenizer=tokenizer(vocab, {"<s>": 2, "<|im|>": 3}),
        special_tokens_map={"eos_token": {"content": "<|im|>"}},
    )
    warned = plan_merge([chat], Recipe(method="mean"), base=base).warnings
    assert len(warned) == 1
    assert "chat: adds other tokens than the base" in warned[0]
    assert "<|im|>" in warned[0]
    plain = save_model(
        "plain",
        tensors,
        special_tokens_map={"eos_token": "<s>"},
        tokenizer=tokenizer(vocab, {"<s>": 2}),
    )
    (special, _) = sorted(
        plan_merge([chat], Recipe(method="mean"), base=plain).warnings,
        key=lambda line: "special" not in line,
    )
    assert "chat: has other special tokens than the base" in special
    swapped = save_model("swapped", tensors, tokenizer=tokenizer({"a": 1, "b": 0}))
    refused(
        "swapped: tokenizer: 'a' of the vocabulary is number 1, in the base .* it is 0",
        [swapped],
        base=base,
    )
    larger = save_model("larger", tensors, tokenizer=tokenizer({**vocab, "c": 2}))
    refused("larger: tokenizer: has 3 tokens, the base .* has 2", [larger], base=base)
    shifted = save_model("shifted", tensors, tokenizer=tokenizer(vocab, {"<s>": 5}))
    refused("shifted: tokenizer: '<s>' of the added tokens is number 5", [shifted], base=base)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{", "broken JSON"),
        ("config.json", "[]", "holds no table"),
        ("tokenizer.json", "{", "broken JSON"),
        ("tokenizer.json", '{"model": 3, "added_tokens": [4]}', None),
        ("tokenizer.json", '{"model": {"vocab": [["a", 0], 7, []]}}', None),
        ("config.json", '{"model_type": "toy", "hidden_size": 37, "text_config": []}', None),
    ],
)
def test_files_of_strangers_are_refused_or_read(
    file: str, content: str, reason: str | None, save_model: Any
) -> None:
    tensors = {"w": torch.ones(2)}
    other, model = save_model("other", tensors, tokenizer={}), save_model("m", tensors)
    (model / file).write_text(content)
    if reason is None:
        assert plan_merge([other, model], Recipe(method="mean")).modules == 1
    else:
        refused(f"m/{file}: {reason}", [other, model])


def test_other_tokenizers_and_nested_configurations(save_model: Any) -> None:
    tensors = {"w": torch.ones(2)}
    one = save_model("one", tensors, vocab={"a": 0})
    other = save_model("other", tensors, vocab={"a": 4})
    refused("other: tokenizer: 'a' of the vocabulary is number 4", [one, other])
    lines = [save_model(name, tensors) for name in ("l1", "l2")]
    (lines[0] / "vocab.txt").write_text("x\ny\n")
    (lines[1] / "vocab.txt").write_text("y\nx\n")
    refused("l2: tokenizer: 'x' of the vocabulary is number 1", lines)
    unigram = [
        save_model(n, tensors, tokenizer={"model": {"vocab": v}})
        for n, v in (("u1", [["a", -1.0], ["b", -2.0]]), ("u2", [["b", -1.0], ["a", -2.0]]))
    ]
    refused("u2: tokenizer: 'a' of the vocabulary is number 1", unigram)
    nested = [
        save_model(n, tensors, config={"model_type": "v", "text_config": {"hidden_size": s}})
        for n, s in (("n1", 8), ("n2", 16))
    ]
    refused("n2: config.json: hidden_size is 16, in .*n1 it is 8", nested)


def test_plans_are_plain_data(models: list[Path]) -> None:
    from dataclasses import asdict

    plan = plan_merge(models[1:], Recipe(method="mean"), base=models[0])
    assert json.loads(json.dumps(asdict(plan)))["modules"] == 3
