"""Any stretch of a stored tensor is what the library reads, and headers are not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anabranch.vectors.safetensors_file import write_streamed
from anabranch.vectors.safetensors_header import DTYPES, read_header

TENSORS = {
    "half": torch.randn(30, 7, generator=torch.Generator().manual_seed(0)).half(),
    "brain": torch.randn(41, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "single": torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(2)),
    "double": torch.tensor(0.1, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "ids": torch.arange(9),
    "mask": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_any_stretch_is_what_was_saved(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    stored, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    tensor = stored[name]
    flat = TENSORS[name].flatten()
    assert (tensor.shape, tensor.dtype) == (TENSORS[name].shape, TENSORS[name].dtype)
    assert tensor.size_bytes == flat.numel() * flat.element_size()
    for first, count in ((0, len(flat)), (len(flat) // 3, len(flat) // 2)):
        wanted = flat[first : first + count]
        assert torch.equal(tensor.entries(first, count), wanted)
        wide = torch.empty(count)
        tensor.fill(first, wide)
        assert torch.equal(wide, wanted.float())


def test_conversion_goes_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anabranch.vectors.safetensors_header._PIECE", 11)
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    wide = torch.empty(200)
    read_header(path)[0]["half"].fill(3, wide)
    assert torch.equal(wide, TENSORS["half"].flatten()[3:203].float())


def test_what_is_written_by_pieces_is_what_is_written_at_once(tmp_path: Path) -> None:
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    write_streamed(tmp_path / "a", layout, lambda n: TENSORS[n].flatten().split(5), {})
    write_streamed(tmp_path / "b", layout, lambda n: [TENSORS[n]], {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stored, _ = read_header(tmp_path / "a")
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name].entries(0, tensor.numel()), tensor.flatten()), name


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[1]",
        b"\xff",
        {"w": 3},
        {"w": {}},
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=["x"]),
        entry(shape=[1 << 40], data_offsets=[0, 1 << 42]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[8, 16]),
        entry(data_offsets=[8]),
        {"__metadata__": [], **entry()},
    ],
)
def test_hostile_headers_are_refused_by_name(header: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "evil.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=r"evil\.safetensors: not a safetensors file"):
        read_header(path)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "q", entry(dtype="F8_E4M3", data_offsets=[0, 2]), bytes(8))
    with pytest.raises(ValueError, match="q: w holds F8_E4M3; give floating-point"):
        read_header(path)
    assert "F8_E4M3" not in DTYPES


def test_a_file_cut_short_later_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "short", entry(), bytes(8))
    stored = read_header(path)[0]["w"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="short: ends inside w"):
        stored.entries(0, 2)
    path.unlink()
    with pytest.raises(ValueError, match=r"short: cannot be read \(No such file"):
        read_header(path)
