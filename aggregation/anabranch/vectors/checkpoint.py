"""Whole models on disk: safetensors, in one file or in shards, read a stretch at a time.

Shape legend: L entries of a stretch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anabranch.vectors.new_folder import write_text
from anabranch.vectors.safetensors_file import Layout, fill, lay_out
from anabranch.vectors.safetensors_header import StoredTensor, read_header
from anabranch.vectors.task_vector import Stored, TaskVector

SINGLE_FILE = "model.safetensors"
INDEX_FILE = SINGLE_FILE + ".index.json"
MAX_INDEX_BYTES = 64 << 20

_METADATA = {"format": "pt"}

_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Configuration, tokenizer and code that belong to a model and are not its weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors, where they lie.

    Attributes:
        path: The folder or file that was named.
        tensors: By name, in sorted order.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def folder(self) -> Path | None:
        """Where its configuration and tokenizer are; None for a lone file."""
        return self.path if self.path.is_dir() else None

    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint: a folder, or one safetensors file.

    Raises:
        ValueError: One line that names the file and the fix: nothing there, pickle only, a broken
            index or header, a quantised dtype.
    """
    if path.is_file():
        return Checkpoint(path, read_header(path)[0])
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; name a checkpoint on this machine")
    if (path / INDEX_FILE).is_file():
        return Checkpoint(path, _sharded(path))
    if (path / SINGLE_FILE).is_file():
        return Checkpoint(path, read_header(path / SINGLE_FILE)[0])
    if any(path.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{path}: holds pickle, which runs code when it is opened; "
            "save it again with save_pretrained(..., safe_serialization=True)"
        )
    raise ValueError(f"{path}: has no {SINGLE_FILE} and no {INDEX_FILE}; name a checkpoint folder")


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of the shards that an index names, once it says of each where it really is."""
    index = folder / INDEX_FILE
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{index}: is over {MAX_INDEX_BYTES} bytes; fetch it again")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        homes = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: has no table weight_map ({error}); fetch it again") from error
    shards = {}
    for file in sorted(set(homes.values())):
        # The index may come from a stranger: it opens nothing outside its folder.
        if Path(file).name != file:
            raise ValueError(f"{index}: {file!r} is no file name; fetch it again")
        shards[file] = read_header(folder / file)[0]
    held = {name: file for file, tensors in shards.items() for name in tensors}
    for name in sorted({*homes, *held}):
        if held.get(name) != homes.get(name):
            raise ValueError(
                f"{index}: {name} stands in {held.get(name)}, the index says {homes.get(name)}; "
                "fetch it again"
            )
    return {name: shards[homes[name]][name] for name in sorted(homes)}


class Reference:
    """The base's entries in fp32. The last stretch is kept: each contribution subtracts it.

    Args:
        tensors: The base's tensors by name.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._last: tuple[str, int, Tensor] = ("", 0, torch.empty(0))

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """``count`` entries of a tensor from ``first`` on [L]; not to be written to.

        Raises:
            ValueError: An entry that is not finite in fp32.
        """
        held, start, held_L = self._last
        if (held, start, len(held_L)) == (name, first, count):
            return held_L
        self._last = ("", 0, torch.empty(0))
        out_L = torch.empty(count, dtype=torch.float32)
        self._tensors[name].fill(first, out_L)
        _check_finite(out_L, self._tensors[name])
        self._last = (name, first, out_L)
        return out_L


def stored_vector(
    checkpoint: Checkpoint, modules: Iterable[str], base: Reference | None
) -> TaskVector:
    """What fine-tuning added to the base, left on disk; the weights themselves without a base."""

    def stored(name: str) -> Stored:
        tensor = checkpoint.tensors[name]

        def read(first: int, out_L: Tensor) -> None:
            tensor.fill(first, out_L)
            if base is not None:
                out_L.sub_(base.entries(name, first, len(out_L)))
            _check_finite(out_L, tensor)

        return Stored(tensor.shape, read)

    return TaskVector({name: stored(name) for name in modules})


def _check_finite(entries_L: Tensor, tensor: StoredTensor) -> None:
    if len(entries_L):
        low, high = torch.aminmax(entries_L)
        # A comparison that NaN fails.
        if not max(abs(float(low)), abs(float(high))) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"{tensor.path}: {tensor.name} holds numbers that are not finite in fp32; "
                "drop that contribution"
            )


def write_checkpoint(
    folder: Path, layout: Layout, pieces: Callable[[str], Iterable[Tensor]], shard_bytes: int
) -> None:
    """Write tensors as the shards and the index that transformers reads, in order of their names.

    Args:
        folder: Exists, and holds no checkpoint.
        layout: Dtype and shape of every tensor.
        pieces: A tensor's entries in row order, cut anywhere.
        shard_bytes: Most bytes of tensors in a file, unless one tensor alone has more.
    """
    lay_out_checkpoint(folder, layout, shard_bytes)
    fill_checkpoint(folder, layout, shard_bytes, pieces, layout)


def lay_out_checkpoint(folder: Path, layout: Layout, shard_bytes: int) -> None:
    """Write the files of ``write_checkpoint`` without the entries: headers and the index."""
    files = _files(layout, shard_bytes)
    for file, shard in files.items():
        lay_out(folder / file, shard, _METADATA)
    if len(files) == 1:
        return
    weight_map = {name: file for file, shard in files.items() for name in shard}
    total = sum(dtype.itemsize * shape.numel() for dtype, shape in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def fill_checkpoint(
    folder: Path,
    layout: Layout,
    shard_bytes: int,
    pieces: Callable[[str], Iterable[Tensor]],
    names: Iterable[str],
) -> None:
    """Write the entries of some tensors into files laid out; several processes may do so at once.

    Args:
        folder: Where ``lay_out_checkpoint`` was called with this layout.
        layout: Dtype and shape of every tensor.
        shard_bytes: As it was then.
        pieces: A tensor's entries in row order, cut anywhere.
        names: Which tensors.
    """
    wanted = set(names)
    for file, shard in _files(layout, shard_bytes).items():
        if mine := [name for name in shard if name in wanted]:
            fill(folder / file, shard, pieces, _METADATA, mine)


def _files(layout: Layout, shard_bytes: int) -> dict[str, Layout]:
    """What each file of a checkpoint holds, by its name."""
    shards: list[dict[str, tuple[torch.dtype, torch.Size]]] = [{}]
    held = 0
    for name in sorted(layout):
        dtype, shape = layout[name]
        size_bytes = dtype.itemsize * shape.numel()
        if shards[-1] and held + size_bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = layout[name]
        held += size_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def companions(folder: Path) -> list[Path]:
    """Files of a model's folder that are no weights: configuration, tokenizer, code, licence."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and (path.suffix in _COMPANIONS or path.name.startswith("LICENSE"))
    ]


def copy_companions(folder: Path, out: Path) -> None:
    """Copy ``companions`` into a new checkpoint, and wait until they are on disk."""
    for path in companions(folder):
        with path.open("rb") as source, (out / path.name).open("xb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
