"""The fuzzer's door for receipts."""

from __future__ import annotations

import json

from anabranch.wire.canonical import canonical
from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.receipt import Exclusion, Input, Output, Receipt, decode_receipt, encode_receipt
from anabranch.wire.signing import RECEIPT, KeyRing

_KEY = seeded_key("coordinator", 1)
_RING = KeyRing(by_id([_KEY.public]))


def written_by_a_coordinator(data: bytes) -> None:
    """Read a receipt: its bytes as they are after a zero, else its inside, spelled and signed.

    Raises:
        WireError: It is refused.
    """
    message = data[1:]
    if data[:1] != b"\0":
        try:
            body = json.loads(message)
            signature = _KEY.sign(RECEIPT + canonical(body)).hex()
            message = canonical({"receipt": body, "signature": signature})
        # What is no JSON comes as it is.
        except (ValueError, RecursionError):
            pass
    # Nothing but what a coordinator writes is taken.
    assert encode_receipt(decode_receipt(message, _RING), _KEY) == message


def seeds() -> list[bytes]:
    """A sound receipt, and its inside."""
    receipt = Receipt(
        kind="merge", federation="f", run="r", round=1, time_s=1.5, software="s",
        base_hash="ab" * 32, start_hash="cd" * 32,
        inputs=(Input(client="c", round=1, artifact="ef" * 32, size_bytes=9, weight=1.0),),
        exclusions=(Exclusion(client="d", code="norm", reason="too large"),),
        recipe={"method": "mean", "scale": 1e-7}, scores={"start.accuracy": None},
        output=Output(adapter_hash="ab" * 32, artifact="cd" * 32, size_bytes=9),
    )  # fmt: skip
    data = encode_receipt(receipt, _KEY)
    return [b"\0" + data, b"\1" + canonical(json.loads(data)["receipt"])]
