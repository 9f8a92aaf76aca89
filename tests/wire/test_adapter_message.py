"""Adapters on their way down: what travels, and how many ranks a receiver takes up."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from anabranch.vectors import Adapter, LoraFactors, LowRank, seeded_start
from anabranch.vectors.frozen import join
from anabranch.wire import CodecConfig, UpdateMeta, WireError, encode_update
from anabranch.wire.adapter_message import decode_adapter, encode_adapter
from anabranch.wire.config import DenseDtype
from anabranch.wire.plan import RoundPlan, Trains

TEMPLATE = Adapter(
    {"layer": LoraFactors(torch.zeros(2, 8), torch.zeros(6, 2), 4.0)},
    {"head": torch.ones(3)},
    base_hash="ab" * 32,
)
KNOWN = seeded_start(TEMPLATE, 1)


def plan(trains: Trains = "both") -> RoundPlan:
    given = {"federation": "f", "run": "r", "round": 1, "seed": 1, "trains": trains}
    return RoundPlan.model_validate({**given, "base_hash": "ab" * 32, "start_hash": "cd" * 32})


def moved(*names: str) -> Adapter:
    generator = torch.Generator().manual_seed(4)
    fresh = {n: torch.randn(KNOWN.tensors()[n].shape, generator=generator) for n in names}
    return KNOWN.with_tensors({**KNOWN.tensors(), **fresh})


@pytest.mark.parametrize("trains", get_args(Trains))
@pytest.mark.parametrize("dtype", get_args(DenseDtype))
def test_what_is_decoded_is_what_was_sent(trains: Trains, dtype: DenseDtype) -> None:
    names = ["layer.lora_B", "head"] + ["layer.lora_A"] * (trains != "b")
    adapter = moved(*names)
    encoded = encode_adapter(adapter, plan(trains), dtype)
    assert sorted(encoded.sent) == sorted(names)
    decoded = decode_adapter(encoded.blob, KNOWN, trains)
    wanted = {**adapter.tensors(), **encoded.sent}
    for name, tensor in decoded.tensors().items():
        assert torch.equal(tensor, wanted[name])
    assert decoded.lora["layer"].alpha == 4.0


@pytest.mark.parametrize(
    ("frozen", "refused"), [(1, ""), (6, ""), (7, "layout"), (5000, "too-large")]
)
def test_frozen_ranks_are_taken_up_as_far_as_the_matrix_has_any(frozen: int, refused: str) -> None:
    whole = join(KNOWN, {"layer": LowRank(torch.rand(6, frozen), torch.rand(frozen, 8))})
    blob = encode_adapter(whole, plan(), "fp32").blob
    if not refused:
        assert decode_adapter(blob, KNOWN, "both").hash() == whole.hash()
        return
    with pytest.raises(WireError) as caught:
        decode_adapter(blob, KNOWN, "both")
    assert caught.value.code == refused


def test_factors_that_do_not_multiply_and_missing_ones_are_refused() -> None:
    meta = UpdateMeta("adapter", "ab" * 32, "", "f", "r", 1, "", b"", 1, 0)
    whole = KNOWN.tensors()
    for changed in (
        {**whole, "layer.lora_A": torch.ones(5, 8)},
        {**whole, "layer.lora_A": torch.ones(1, 8), "layer.lora_B": torch.ones(6, 1)},
        {**whole, "other.lora_A": torch.ones(5, 8)},
        {"layer.lora_B": torch.ones(6, 2)},
    ):
        blob = encode_update(changed, meta, CodecConfig(name="dense")).blob
        for trains in ("both", "alternate"):
            with pytest.raises(WireError):
                decode_adapter(blob, KNOWN, trains)
