"""Safetensors files: written to the same bytes every time, read with a cap on what they claim.

The library's own writer orders metadata at random, so that equal adapters would have unequal files,
makes files nobody else can read (mode 0600), and wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anabranch.vectors.safetensors_header import DTYPES, header_size

Layout = Mapping[str, tuple[torch.dtype, torch.Size]]
"""Dtype and shape of every tensor of a file, by name."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata.

    Raises:
        ValueError: Unreadable or broken file, header over the cap, entries that are not floating
            point. Names the file.
    """
    header_size(path)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for name in sorted(file.keys()):
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); fetch it again") from error
    for name, tensor in tensors.items():
        _check_merged(path, name, tensor.dtype)
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file and wait until it is on disk. Equal arguments give equal bytes.

    Args:
        path: A file that does not exist.
        tensors: Floating-point tensors by name.
        metadata: Strings for the header.

    Raises:
        ValueError: A tensor that is not floating point.
        OSError: The file cannot be written.
    """
    for name, tensor in tensors.items():
        _check_merged(path, name, tensor.dtype)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_streamed(path, layout, lambda name: [tensors[name]], metadata)


def write_streamed(
    path: Path,
    layout: Layout,
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a new file a piece at a time, and wait until it is on disk.

    Args:
        path: A file that does not exist.
        layout: What it will hold.
        pieces: A tensor's entries in row order, cut anywhere, in the dtype the layout gives.
        metadata: Strings for the header.

    Raises:
        OSError: The file cannot be written.
    """
    lay_out(path, layout, metadata)
    fill(path, layout, pieces, metadata, layout)


def lay_out(path: Path, layout: Layout, metadata: Mapping[str, str]) -> None:
    """Write a new file's header, and room for its tensors; see ``write_streamed``."""
    header, spans = _header(layout, metadata)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(max((end for _, end in spans.values()), default=len(header)))


def fill(
    path: Path,
    layout: Layout,
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
    names: Iterable[str],
) -> None:
    """Write the entries of some tensors into a file laid out, and wait until they are on disk.

    Tensors do not overlap, so several processes may fill one file at once.

    Args:
        path: What ``lay_out`` wrote for this layout and metadata.
        layout: What the file holds.
        pieces: A tensor's entries in row order, cut anywhere, in the dtype the layout gives.
        metadata: Strings of the header.
        names: Which tensors.
    """
    wanted = set(names)
    _, spans = _header(layout, metadata)
    with path.open("r+b") as file:
        for name, (start, end) in spans.items():
            if name not in wanted:
                continue
            file.seek(start)
            for piece in pieces(name):
                assert piece.dtype == layout[name][0]
                flat = piece.detach().cpu().contiguous().reshape(-1)
                # numpy knows no bfloat16: bytes are taken through a uint8 view.
                file.write(flat.view(torch.uint8).numpy().data)
            assert file.tell() == end
        file.flush()
        os.fsync(file.fileno())


def _header(
    layout: Layout, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A file's first bytes, and from where to where each tensor lies in it, in their order."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    spans, offset = {}, 0
    # Widest entries first, as the format's own writer has them: every tensor starts aligned.
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        spans[name] = (offset, offset + shape.numel() * dtype.itemsize)
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": list(spans[name]),
        }
        offset = spans[name][1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {n: (len(first) + start, len(first) + end) for n, (start, end) in spans.items()}


def _check_merged(path: Path, name: str, dtype: torch.dtype) -> None:
    if dtype not in _CODES or not dtype.is_floating_point:
        raise ValueError(
            f"{path}: {name} holds {dtype}; give floating-point weights, not quantised"
        )
