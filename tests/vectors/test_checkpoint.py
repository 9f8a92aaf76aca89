"""Checkpoints are opened by their headers, and written as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anabranch.vectors.checkpoint import (
    Reference,
    companions,
    open_checkpoint,
    stored_vector,
    write_checkpoint,
)

TENSORS = {
    "b": torch.arange(12.0).view(3, 4),
    "a": torch.ones(5).half(),
    "ids": torch.arange(3),
}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_is_opened_by_its_headers(shards: int, save_model: Any) -> None:
    opened = open_checkpoint(save_model("m", TENSORS, shards=shards))
    assert list(opened.tensors) == ["a", "b", "ids"]
    assert opened.size_bytes() == 48 + 10 + 24
    for name, tensor in TENSORS.items():
        assert torch.equal(opened.tensors[name].entries(0, tensor.numel()), tensor.flatten())


def test_a_lone_file_is_a_checkpoint_without_companions(save_model: Any) -> None:
    folder = save_model("m", TENSORS)
    opened = open_checkpoint(folder / "model.safetensors")
    assert opened.folder is None
    assert sorted(opened.tensors) == sorted(TENSORS)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: there is no such folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds pickle"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "has no table weight_map"),
        ('{"weight_map": 3}', "has no table weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "is no file name"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors: cannot be read"),
        ('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}', "the index says"),
    ],
)
def test_an_index_is_not_believed(index: str, reason: str, save_model: Any) -> None:
    folder = save_model("m", TENSORS, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=reason):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard_bytes", [1000, 50, 1])
def test_shards_hold_everything_once_and_no_more_than_they_may(
    shard_bytes: int, tmp_path: Path
) -> None:
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    write_checkpoint(tmp_path, layout, lambda name: [TENSORS[name]], shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    held = [load_file(file) for file in files]
    together = {name: tensor for part in held for name, tensor in part.items()}
    assert sum(map(len, held)) == len(together) == len(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(together[name], tensor)
    for part in held:
        assert len(part) == 1 or sum(t.numel() * t.element_size() for t in part.values()) <= (
            shard_bytes
        )
    if shard_bytes == 1000:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        homes = {n: f.name for f, part in zip(files, held, strict=True) for n in part}
        assert index == {"metadata": {"total_size": 82}, "weight_map": homes}
    assert sorted(open_checkpoint(tmp_path).tensors) == sorted(TENSORS)


def test_companions_are_no_weights(save_model: Any) -> None:
    folder = save_model("m", TENSORS, shards=2, tokenizer={}, generation_config={})
    for name in ("optimizer.pt", "pytorch_model.bin", ".hidden.json", "LICENSE", "merges.txt"):
        (folder / name).write_text("x")
    (folder / "onnx").mkdir()
    names = [path.name for path in companions(folder)]
    assert names == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
    ]


def test_a_stored_vector_is_the_difference(save_model: Any) -> None:
    tuned = {name: tensor + 1 for name, tensor in TENSORS.items()}
    base = open_checkpoint(save_model("base", TENSORS))
    model = open_checkpoint(save_model("m", tuned))
    vector = stored_vector(model, ["a", "b"], Reference(base.tensors))
    assert torch.equal(vector.deltas["b"].dense(), torch.ones(3, 4))
    alone = stored_vector(model, ["b"], None)
    assert torch.equal(alone.deltas["b"].dense(), tuned["b"])
    part = torch.empty(3)
    alone.deltas["b"].read(4, part)
    assert part.tolist() == [5.0, 6.0, 7.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "m"])
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(
    bad: float, where: str, save_model: Any
) -> None:
    broken = {"b": TENSORS["b"].clone()}
    broken["b"][2, 1] = bad
    folders = {n: save_model(n, broken if n == where else TENSORS) for n in ("base", "m")}
    base, model = (open_checkpoint(folders[name]) for name in ("base", "m"))
    vector = stored_vector(model, ["b"], Reference(base.tensors))
    with pytest.raises(ValueError, match=f"{where}/model.safetensors: b holds numbers that are"):
        vector.deltas["b"].dense()
