"""Memory while hostile input is refused, as the system counts it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

MOST_BYTES = 64 << 20

REFUSE = """
import sys
from pathlib import Path
import torch
import zstandard
from anabranch.wire import CodecConfig, UpdateMeta, WireError, decode_update, encode_update
from anabranch.wire.header import write_header
from anabranch.wire.limits import limits_for
from anabranch.wire.sealing import SEAL_BYTES, new_seal_key
from anabranch.wire.v1 import update_pb2 as pb

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def bomb(size):
    # A megabyte of zeros at a time: making it must not take what refusing it may not.
    writer = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    return b"".join([*(writer.compress(bytes(1 << 20)) for _ in range(size >> 20)), writer.flush()])

def with_header(compressed, payload=b""):
    header = b"ANBR" + compressed
    return len(header).to_bytes(8, "little") + header + payload

# 200 modules of rank 8: an adapter of 13 million entries.
factors = {"A": (8, 4096), "B": (4096, 8)}
layout = {f"layers.{n}.lora_{f}": factors[f] for n in range(200) for f in factors}
meta = UpdateMeta("update", "ab" * 32, "cd" * 32, "f", "r", 1, "c", b"n" * 16, 1, 9, 7)
one = {"x": torch.randn(1 << 16)}
honest = encode_update(one, meta, CodecConfig(density=0.1)).blob
decode_update(honest, {"x": (1 << 16,)})
limits = limits_for(layout)

kind = sys.argv[1]
shapes = layout
if kind == "gigabyte-manifest":
    message = with_header(bomb(1 << 30))
    assert 30_000 < len(message) < 40_000, len(message)
elif kind == "gigabyte-payload":
    start = 8 + int.from_bytes(honest[:8], "little")
    raw = zstandard.ZstdDecompressor().decompress(honest[12:start])
    manifest = pb.Manifest.FromString(raw)
    import hashlib
    payload = bomb(1 << 30) + honest[-820:]
    frame = manifest.frames[0]
    frame.codec = pb.CODEC_TERNARY
    frame.payload_bytes, frame.digest = len(payload), hashlib.sha256(payload).digest()[:16]
    compressed = zstandard.ZstdCompressor().compress(manifest.SerializeToString())
    message, shapes = with_header(compressed, payload), {"x": (1 << 16,)}
elif kind.startswith("many"):
    # As many of the smallest things as the manifest may hold.
    sound = pb.Manifest(format_version=1, kind=1, base_hash=bytes(32)).SerializeToString()
    room = limits.manifest_bytes - len(sound) - 8
    if kind == "many-frames":
        raw = pb.Manifest(frames=[pb.Frame(digest=bytes(16))] * (room // 20)).SerializeToString()
    else:
        size = room // 3 - 20
        row = pb.Frame(names=[""] * size, ranks=[0] * size, entries=size, digest=bytes(16))
        raw = pb.Manifest(frames=[row]).SerializeToString()
    assert room - 100 < len(raw) <= room, (len(raw), room)
    message = with_header(zstandard.ZstdCompressor().compress(sound + raw))
elif kind == "sealed":
    message = bytes(limits.message_bytes + SEAL_BYTES + 1)

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
try:
    if kind == "sealed":
        new_seal_key().open(message, limits.message_bytes)
    else:
        decode_update(message, shapes)
except WireError as error:
    print(error.code, status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("gigabyte-manifest", "too-large"),
        ("gigabyte-payload", "too-large"),
        ("many-frames", "layout"),
        ("many-tensors", "layout"),
        ("sealed", "too-large"),
    ],
)
def test_refusing_hostile_input_takes_little_memory(kind: str, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSE, kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got, peak = done.stdout.split()
    print(kind, int(peak) / 2**20, "MiB")
    assert got == code
    assert int(peak) <= MOST_BYTES
