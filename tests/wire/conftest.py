import hashlib

import pytest
import torch
from torch import Tensor

from anabranch.wire import UpdateMeta
from anabranch.wire.codecs import support


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
def runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Supports are written as runs even where they are few: for what looks into the payload."""
    monkeypatch.setattr(support, "_FEW", 0)


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
