import hashlib
from collections.abc import Callable
from typing import Protocol

import pytest
import torch
from torch import Tensor

from anabranch.wire import UpdateMeta, zstd
from anabranch.wire.header import LENGTH_BYTES, MAGIC
from anabranch.wire.v1 import update_pb2 as pb


@pytest.fixture
def meta() -> UpdateMeta:
    return UpdateMeta(
        kind="update",
        base_hash=hashlib.sha256(b"base").hexdigest(),
        start_hash=hashlib.sha256(b"start").hexdigest(),
        federation="clinics",
        run="run-7",
        round=3,
        client="client-03",
        nonce=hashlib.sha256(b"nonce").digest()[:16],
        seed=1234,
        examples=512,
        issued_s=1_767_225_600,
    )


@pytest.fixture
def demo() -> dict[str, Tensor]:
    """The demo's adapter: rank 8 on query and value of six layers of width 384."""
    generator = torch.Generator().manual_seed(11)
    return {
        f"encoder.layer.{layer}.attention.self.{matrix}.lora_{factor}": 1e-3
        * torch.randn(shape, generator=generator)
        for layer in range(6)
        for matrix in ("query", "value")
        for factor, shape in (("A", (8, 384)), ("B", (384, 8)))
    }


@pytest.fixture
def small() -> dict[str, Tensor]:
    """Three tensors of one frame, with a run of zeros beyond 510 and a tensor of zeros."""
    generator = torch.Generator().manual_seed(12)
    gap = torch.zeros(900)
    gap[[0, 899]] = torch.tensor([1.0, -3.0])
    return {
        "a.weight": torch.randn((6, 50), generator=generator),
        "b.gap": gap,
        "c.zero": torch.zeros(4, 5),
        "d.scalar": torch.tensor(-0.5),
    }


Change = Callable[[pb.Manifest, list[bytes]], object]


class Forge(Protocol):
    """Rewrites a message as an attacker would: lengths and digests are made to agree again."""

    def __call__(
        self, blob: bytes, change: Change, damage: Callable[[bytes], bytes] = bytes
    ) -> bytes:
        """The message with its manifest and payloads changed, then the manifest's bytes."""
        ...


@pytest.fixture
def forge() -> Forge:
    def forged(blob: bytes, change: Change, damage: Callable[[bytes], bytes] = bytes) -> bytes:
        start = LENGTH_BYTES + int.from_bytes(blob[:LENGTH_BYTES], "little")
        raw = zstd.decompress(blob[LENGTH_BYTES + len(MAGIC) : start], 1, 1 << 20, "manifest")
        manifest = pb.Manifest.FromString(raw)
        payloads = []
        for frame in manifest.frames:
            payloads.append(blob[start : start + frame.payload_bytes])
            start += frame.payload_bytes
        before = list(payloads)
        change(manifest, payloads)
        for frame, old, new in zip(manifest.frames, before, payloads, strict=False):
            if new != old:
                frame.payload_bytes = len(new)
                frame.digest = hashlib.sha256(new).digest()[:16]
        header = MAGIC + zstd.compress_text(damage(manifest.SerializeToString()))
        return len(header).to_bytes(LENGTH_BYTES, "little") + header + b"".join(payloads)

    return forged
