from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from anabranch.coordinator.admission import RefusedError, claims, examine
from anabranch.coordinator.start import Start
from anabranch.vectors import Adapter, LoraFactors
from anabranch.wire import CodecConfig, UpdateMeta, encode_update
from anabranch.wire.plan import UPDATE_STYPE, RoundPlan
from anabranch.wire.v1 import update_pb2 as pb

Change = Callable[[pb.Manifest, list[bytes]], object]

LAYOUT = {"layer.lora_A": (2, 8), "layer.lora_B": (6, 2)}
START = Adapter(
    {"layer": LoraFactors(torch.zeros(2, 8), torch.zeros(6, 2), 4.0)}, base_hash="ab" * 32
)
PLAN = RoundPlan(
    codec=CodecConfig(name="dense"),
    federation="f",
    run="r",
    round=3,
    base_hash="ab" * 32,
    start_hash="cd" * 32,
    seed=1,
)
META = UpdateMeta(
    kind="update",
    base_hash=PLAN.base_hash,
    start_hash=PLAN.start_hash,
    federation="f",
    run="r",
    round=3,
    client="site-a",
    nonce=b"n" * 16,
    seed=1,
    examples=10,
)
pytestmark = pytest.mark.usefixtures("flower_identity")

ASKED = Start(PLAN, START, {}, None)


def tensors(value: float = 0.5) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value) for name, shape in LAYOUT.items()}


def blob(meta: UpdateMeta = META, value: float = 0.5) -> bytes:
    return encode_update(tensors(value), meta, CodecConfig(name="dense")).blob


def reply(
    data: bytes | None = None, *, stype: str = UPDATE_STYPE, name: str = "site-a", **metrics: Any
) -> Message:
    data = blob() if data is None else data
    order = Message(RecordDict(), 7, MessageType.TRAIN)
    content = RecordDict(
        {
            "update": ArrayRecord({"update": Array("uint8", (len(data),), stype, data)}),
            "client": ConfigRecord({"client": name}),
            "metrics": MetricRecord(metrics),
        }
    )
    return Message(content, reply_to=order)


def code(message: Message, **limits: float) -> str:
    with pytest.raises(RefusedError) as caught:
        examine(message, ASKED, "site-a", **limits)
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_a_good_reply_is_admitted_with_its_finite_metrics() -> None:
    message = reply(**{"num-examples": 10, "train-loss": float("nan")})
    candidate = examine(message, ASKED, "site-a", max_norm=100)
    assert candidate.blob == blob()
    assert candidate.metrics == {"num-examples": 10.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"round": 2}, "stale-round"),
        ({"round": 4}, "wrong-round"),
        ({"federation": "g"}, "wrong-federation"),
        ({"run": "s"}, "wrong-run"),
        ({"base_hash": "00" * 32}, "wrong-base-hash"),
        ({"start_hash": "00" * 32}, "wrong-start-hash"),
        ({"client": "site-b"}, "wrong-client"),
        ({"kind": "adapter"}, "wrong-kind"),
    ],
)
def test_an_update_made_for_something_else_is_refused(
    change: dict[str, Any], expected: str
) -> None:
    assert code(reply(blob(dataclasses.replace(META, **change)))) == expected


def _empty() -> Message:
    return Message(RecordDict(), reply_to=Message(RecordDict(), 7, MessageType.TRAIN))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_empty, "no-update"),
        (lambda: reply(stype="numpy.ndarray"), "wrong-format"),
        (lambda: reply(name="site-b"), "wrong-client"),
    ],
)
def test_a_reply_of_another_form_is_refused(make: Callable[[], Message], expected: str) -> None:
    assert code(make()) == expected


def test_broken_bytes_are_refused_with_the_wire_s_own_reason() -> None:
    assert code(reply(b"")) == "truncated"
    assert code(reply(blob()[:-1])) == "truncated"
    assert code(reply(blob() + b"x")) == "trailing"


@pytest.mark.parametrize(("trains", "number", "factor"), [
    ("b", 3, "B"), ("b", 4, "B"), ("alternate", 3, "B"), ("alternate", 4, "A"),
])  # fmt: skip
def test_only_the_factor_that_the_round_trains_is_admitted(
    trains: str, number: int, factor: str
) -> None:
    plan = PLAN.model_copy(update={"trains": trains, "round": number})
    meta = dataclasses.replace(META, round=number)

    def update(*names: str) -> Message:
        part = {name: tensors()[name] for name in names}
        return reply(encode_update(part, meta, CodecConfig(name="dense")).blob)

    asked, kept = f"layer.lora_{factor}", f"layer.lora_{'AB'.replace(factor, '')}"
    assert list(examine(update(asked), Start(plan, START, {}, None), "site-a").changes) == [asked]
    for wrong in ((kept,), (kept, asked)):
        with pytest.raises(RefusedError) as caught:
            examine(update(*wrong), Start(plan, START, {}, None), "site-a")
        assert caught.value.code in ("layout", "too-large")


WEIGHED = Start(PLAN.model_copy(update={"importance": True}), START, {}, None)


def fisher(rows: float = 4.0, columns: float = 9.0) -> dict[str, torch.Tensor]:
    return {
        "layer.importance_rows": torch.full((6,), rows),
        "layer.importance_columns": torch.full((8,), columns),
    }


def weighed(importance: dict[str, torch.Tensor]) -> bytes:
    return encode_update(tensors(), META, CodecConfig(name="dense"), importance=importance).blob


def test_importance_is_admitted_where_it_is_asked_for() -> None:
    candidate = examine(reply(weighed(fisher())), WEIGHED, "site-a")
    assert list(candidate.importance) == sorted(fisher())
    for name, part in fisher().items():
        torch.testing.assert_close(candidate.importance[name], part)
    plain = examine(reply(), ASKED, "site-a")
    assert plain.importance == {}
    assert all(
        torch.equal(candidate.changes[name].dense(), plain.changes[name].dense()) for name in LAYOUT
    )


def levels(value: int) -> Change:
    """The importance's last level, of a row, becomes this."""

    def change(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        payloads[-1] = payloads[-1][:-1] + value.to_bytes(1, "little", signed=True)

    return change


def scales(value: float) -> Change:
    """The scales of both sides, a block each, become this."""

    def change(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        payloads[-1] = 2 * struct.pack("<f", value) + payloads[-1][8:]

    return change


def claim(**fields: Any) -> Change:
    """The importance's frame claims this."""

    def change(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        for field, value in fields.items():
            setattr(manifest.importance[0], field, value)

    return change


@pytest.mark.parametrize(
    ("importance", "change", "expected", "reason"),
    [
        ({}, None, "importance", "the importance of the update is missing"),
        ({"layer.importance_rows": torch.ones(6)}, None, "layout", "layer.importance_columns"),
        ({**fisher(), "other": torch.ones(2)}, None, "layout", "other"),
        ({**fisher(), "layer.importance_rows": torch.ones(2, 3)}, None, "layout", "(2, 3)"),
        ({**fisher(), "layer.importance_rows": torch.ones(7)}, None, "layout", "(7,)"),
        ({"layer.importance_rows": torch.rand(1 << 16)}, None, "too-large", "more than"),
        (fisher(), levels(-1), "importance", "layer.importance_rows has a root of -"),
        (fisher(), scales(math.inf), "values", "scale is NaN, negative or too large"),
        (fisher(), scales(math.nan), "values", "scale is NaN, negative or too large"),
        (fisher(), scales(1e18), "importance", "squared, is beyond fp32's range"),
        (fisher(1e20, 1e20), None, "importance", "module layer would have importance up to 1e+40"),
        (fisher(), claim(codec=pb.CODEC_FP32), "codec", "dense-fp32"),
        (fisher(), claim(raw_bytes=1 << 40), "counts", "claims 1099511627776 raw"),
        (fisher(), claim(payload_bytes=1 << 40), "truncated", " of 10995"),
        (fisher(), claim(digest=bytes(16)), "digest", "does not match its digest"),
    ],
)  # fmt: skip
def test_importance_that_cannot_be_is_refused_with_its_reason(
    importance: dict[str, torch.Tensor], change: Change | None, expected: str, reason: str,
    forge: Callable[[bytes, Change], bytes],
) -> None:  # fmt: skip
    data = weighed(importance)
    data = forge(data, change) if change else data
    with pytest.raises(RefusedError) as caught:
        examine(reply(data), WEIGHED, "site-a")
    assert caught.value.code == expected
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importance_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(RefusedError, match="importance of the update is not asked for") as caught:
        examine(reply(weighed(fisher())), ASKED, "site-a")
    assert caught.value.code == "importance"
    # Beyond any message of this layout without it, nothing of it is read.
    assert code(reply(weighed({"layer.importance_rows": torch.rand(1 << 16)}))) == "too-large"


def test_an_update_of_another_rank_than_asked_is_refused() -> None:
    low = START.leading(1)
    plan = PLAN.model_copy(update={"rank": 1})
    part = {name: torch.ones(tensor.shape) for name, tensor in low.tensors().items()}
    update = reply(encode_update(part, META, CodecConfig(name="dense")).blob)
    asked = Start(plan, low, {}, None)
    assert examine(update, asked, "site-a").changes["layer.lora_A"].dense().shape == (1, 8)
    with pytest.raises(RefusedError) as caught:
        examine(reply(), asked, "site-a")
    assert caught.value.code in ("layout", "too-large")
    assert code(update) == "layout"


def coded(asked: dict[str, Any], sent: dict[str, Any]) -> str:
    """The code of the refusal of an update encoded in one way where another was asked for."""
    plan = PLAN.model_copy(update={"codec": CodecConfig.model_validate(asked)})
    values = {
        name: torch.arange(1.0, 1 + part.numel()).reshape(part.shape)
        for name, part in tensors().items()
    }
    update = reply(encode_update(values, META, CodecConfig.model_validate(sent)).blob)
    start = Start(plan, START, {}, None)
    try:
        return "" if examine(update, start, "site-a") else "nothing"
    except RefusedError as error:
        return error.code


def test_the_plan_says_how_an_update_is_encoded() -> None:
    assert coded({"density": 0.5}, {"density": 0.5}) == ""
    assert coded({"density": 0.5}, {"density": 0.2}) == ""
    assert coded({"density": 0.2}, {"density": 0.5}) == "over-density"
    assert coded({"density": 0.5}, {"name": "two-bit", "density": 0.5}) == "wrong-codec"
    assert coded({"density": 0.5}, {"name": "dense"}) == "wrong-codec"
    assert coded({"name": "dense", "dtype": "int8"}, {"name": "dense"}) == "wrong-codec"
    assert coded({"budget": "1 kB"}, {"density": 1.0}) == ""
    assert coded({"budget": "100 B"}, {"density": 1.0}) == "over-budget"


def test_an_oversized_norm_is_refused() -> None:
    assert code(reply(blob(value=5.0)), max_norm=10.0) == "norm"
    assert examine(reply(blob(value=5.0)), ASKED, "site-a", max_norm=30.0).client == "site-a"


def test_finite_factors_whose_product_is_not_are_refused() -> None:
    assert code(reply(blob(value=1e30))) == "overflow"
    assert code(reply(blob(value=1e10))) == "overflow"


def test_only_known_and_possible_claims_are_kept() -> None:
    record = MetricRecord(
        {
            "accuracy": 1e300,
            "loss": -1.0,
            "num-examples": 12,
            "round": 7,
            "evaluate-seconds": [1.0, 2.0],
        }
    )
    assert claims(record, ("accuracy", "loss", "num-examples", "evaluate-seconds")) == {
        "num-examples": 12.0
    }
    assert claims(None, ("loss",)) == {}


def test_ranks_are_taken_where_the_plan_asks_for_them_and_nowhere_else() -> None:
    by_ranks = encode_update(tensors(), META, CodecConfig(name="ranks")).blob
    assert code(reply(by_ranks)) == "wrong-codec"
    plan = PLAN.model_copy(update={"codec": CodecConfig(name="ranks")})
    asked = Start(plan, START, {}, None)
    changes = examine(reply(by_ranks), asked, "site-a").changes
    ranks = changes["layer.lora_B"].dense().flatten().sort().values
    assert torch.equal(ranks, torch.arange(1.0, 13) * ranks[0])
    with pytest.raises(RefusedError, match="'dense-fp32', asked for 'ranks'"):
        examine(reply(), asked, "site-a")
