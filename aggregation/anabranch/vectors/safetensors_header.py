"""What a safetensors file says it holds, and any stretch of it, without mapping it into memory.

A mapped file counts as memory of the process as far as it was read; here only what is asked for is
copied. Headers are hostile until checked: nothing is allocated by what one claims.

Shape legend: L entries of a stretch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_HEADER_BYTES = 16 << 20
"""A header holds some 150 bytes per tensor; a hostile one may claim to be as large as memory."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Floating-point types are merged, the others are copied where all agree."""

_PIECE = 1 << 20
"""Entries converted at once: of another dtype than asked for, only this many are held."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        path: The file.
        name: The tensor's name there.
        dtype: Its dtype.
        shape: Its shape.
        offset: Byte of the file at which it begins.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes it takes in the file."""
        return self.shape.numel() * self.dtype.itemsize

    def fill(self, first: int, out_L: Tensor) -> None:
        """Write the entries from ``first`` on, in row order, into [L], converting to its dtype.

        Args:
            first: Index of the first entry.
            out_L: Contiguous, on the CPU.

        Raises:
            ValueError: The file is shorter than its header says.
        """
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            if out_L.dtype == self.dtype:
                self._read(file, out_L)
                return
            buffer_L = torch.empty(min(_PIECE, len(out_L)), dtype=self.dtype)
            for start in range(0, len(out_L), _PIECE):
                part_L = out_L[start : start + _PIECE]
                self._read(file, buffer_L[: len(part_L)])
                part_L.copy_(buffer_L[: len(part_L)])

    def entries(self, first: int, count: int) -> Tensor:
        """``count`` entries from ``first`` on [L], as they are stored."""
        out_L = torch.empty(count, dtype=self.dtype)
        self.fill(first, out_L)
        return out_L

    def _read(self, file: Any, out_L: Tensor) -> None:
        # numpy knows no bfloat16: bytes are taken through a uint8 view.
        missing = out_L.view(torch.uint8).numpy().data
        while missing:
            got = file.readinto(missing)
            if not got:
                raise ValueError(f"{self.path}: ends inside {self.name}; fetch it again")
            missing = missing[got:]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Where every tensor of a file lies, by name, and the file's metadata.

    Raises:
        ValueError: Unreadable or broken file, header over the cap, dtypes that are not known here.
            Names the file.
    """
    size_bytes = header_size(path)
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(size_bytes)
    try:
        header = json.loads(text)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        claims = {
            name: _claim(header[name], file_bytes - 8 - size_bytes) for name in sorted(header)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); fetch it again") from error
    tensors = {}
    for name, (code, shape, begin) in claims.items():
        if code not in DTYPES:
            raise ValueError(
                f"{path}: {name} holds {code}; give floating-point weights, not quantised"
            )
        tensors[name] = StoredTensor(path, name, DTYPES[code], shape, 8 + size_bytes + begin)
    return tensors, metadata


def _claim(entry: Any, data_bytes: int) -> tuple[str, torch.Size, int]:
    """Dtype, shape and first byte of a header's entry, if they agree with each other."""
    code, shape = str(entry["dtype"]), [int(length) for length in entry["shape"]]
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= begin <= end <= data_bytes:
        raise ValueError(f"a tensor of shape {shape} at {begin} to {end} of {data_bytes} bytes")
    if code in DTYPES and end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"{end - begin} bytes for a tensor of shape {shape} in {code}")
    return code, torch.Size(shape), begin


def header_size(path: Path) -> int:
    """Bytes of the header, once it is known that the file can hold it.

    Raises:
        ValueError: Unreadable file, or a header over the cap.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise ValueError(
            f"{path}: claims a header of {header_bytes} bytes in a file of {size_bytes}, at most "
            f"{MAX_HEADER_BYTES} are read; it is broken or hostile, fetch it again"
        )
    return header_bytes
