from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.published import SIGNATURE_FILE, check_folder, sign_folder
from anabranch.vectors import Adapter, LoraFactors
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire.keys import by_id, new_key
from anabranch.wire.signing import KeyRing

KEY = new_key("coordinator")
RING = KeyRing(by_id([KEY.public]))


def adapter(value: float) -> Adapter:
    factors = LoraFactors(torch.full((2, 8), value), torch.ones(6, 2), 4.0)
    return Adapter({"layer": factors}, base_hash="ab" * 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(adapter(1.0), tmp_path / "adapter")
    config = FederationConfig(name="f", run="r")
    sign_folder(tmp_path / "adapter", adapter(1.0), config, KEY)
    return tmp_path / "adapter"


def test_a_published_adapter_says_where_it_comes_from(folder: Path) -> None:
    assert check_folder(folder, RING) == {
        "adapter_hash": adapter(1.0).hash(),
        "base_hash": "ab" * 32,
        "federation": "f",
        "run": "r",
    }


def test_another_adapter_key_or_statement_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown-key"):
        check_folder(folder, KeyRing({}))
    write_adapter(adapter(2.0), tmp_path / "other")
    with pytest.raises(ValueError, match="there is none; only a signed federation"):
        check_folder(tmp_path / "other", RING)
    shutil.copy(folder / SIGNATURE_FILE, tmp_path / "other")
    with pytest.raises(ValueError, match="is not the one that was signed"):
        check_folder(tmp_path / "other", RING)
    path = folder / SIGNATURE_FILE
    signed = json.loads(path.read_text())
    path.write_text(json.dumps({**signed, "statement": signed["statement"].replace("f", "g")}))
    with pytest.raises(ValueError, match="bad-signature"):
        check_folder(folder, RING)
    for damaged in ("[]", "{}", "x", json.dumps({**signed, "key_id": 7})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="damaged: not a signed statement"):
            check_folder(folder, RING)
