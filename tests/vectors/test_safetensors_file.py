from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from anabranch.vectors.safetensors_file import read_tensors, write_tensors
from anabranch.vectors.safetensors_header import MAX_HEADER_BYTES


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "z.half": torch.randn(3, 5).half(),
        "a.brain": torch.randn(7).bfloat16(),
        "m.single": torch.randn(2, 2, 2),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T,
        "double": torch.randn(2).double(),
    }


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors(), {"format": "pt", "b": "2"})
    for found in (safetensors.torch.load_file(path), read_tensors(path)[0]):
        assert sorted(found) == sorted(tensors())
        for name, tensor in tensors().items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    assert read_tensors(path)[1] == {"format": "pt", "b": "2"}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mine = {name: tensor.contiguous() for name, tensor in tensors().items()}
    safetensors.torch.save_file(mine, path)
    found, metadata = read_tensors(path)
    assert metadata == {}
    assert all(torch.equal(found[name], tensor) for name, tensor in mine.items())


def test_equal_tensors_make_equal_files_that_others_can_read(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_tensors(one, tensors(), {"b": "2", "a": "1"})
    write_tensors(other, dict(reversed(tensors().items())), {"a": "1", "b": "2"})
    assert one.read_bytes() == other.read_bytes()
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert one.stat().st_mode == plain.stat().st_mode


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_tensors(path, tensors(), {})
    assert path.read_bytes() == b"precious"


def header(claim: int, text: bytes = b"{}") -> bytes:
    return claim.to_bytes(8, "little") + text


def test_hostile_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    for content in (
        header(2**63),
        header(MAX_HEADER_BYTES + 1, b" " * (MAX_HEADER_BYTES + 10)),
        header(3),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"evil\.safetensors: claims a header of"):
            read_tensors(path)
    beyond = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    for text in (b"{}x", b"[1]", b"\xff\xfe", json.dumps(beyond).encode()):
        path.write_bytes(header(len(text), text))
        with pytest.raises(ValueError, match=r"evil\.safetensors: not a safetensors file"):
            read_tensors(path)
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"evil\.safetensors"):
        read_tensors(path)
    with pytest.raises(ValueError, match=r"none\.safetensors: cannot be read"):
        read_tensors(tmp_path / "none.safetensors")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3, dtype=torch.int8)}, path)
    with pytest.raises(ValueError, match=r"q\.safetensors: w holds torch.int8"):
        read_tensors(path)
    with pytest.raises(ValueError, match=r"w holds torch\.int8"):
        write_tensors(tmp_path / "new", {"w": torch.ones(3, dtype=torch.int8)}, {})
