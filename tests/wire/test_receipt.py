"""Receipts: golden bytes, chains, and every reason why one is not taken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.wire import WireError
from anabranch.wire import receipt as receipt_module
from anabranch.wire.canonical import canonical, parse_canonical
from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.receipt import (
    LIMIT_BYTES,
    Exclusion,
    Input,
    Output,
    Receipt,
    Restored,
    check_chain,
    decode_receipt,
    encode_receipt,
    receipt_hash,
)
from anabranch.wire.signing import RECEIPT, KeyRing

KEY, OTHER = seeded_key("coordinator", 1), seeded_key("coordinator", 2)
RING = KeyRing(by_id([KEY.public]))
GOLDEN = Path(__file__).parent / "golden" / "receipt-v1.json"


def one(server_round: int = 1, previous: str | None = None, **changes: Any) -> Receipt:
    """A merge's receipt; each round's output is the next one's start."""
    given: dict[str, Any] = {
        "kind": "merge",
        "federation": "klinik-süd",
        "run": "2026-11",
        "round": server_round,
        "time_s": 1764331234.5,
        "software": "anabranch 0.1.0, torch 2.13.0",
        "previous": previous,
        "base_hash": "ab" * 32,
        "start_hash": f"{server_round - 1:064x}",
        "inputs": (
            Input(
                client="a",
                round=server_round,
                artifact="11" * 32,
                size_bytes=2048,
                nonce="00ff" * 8,
                weight=0.1,
            ),
            Input(client="b", round=server_round, artifact="22" * 32, size_bytes=2049, factor=0.5),
        ),
        "exclusions": (Exclusion(client="c", code="deadline", reason="no reply within 60 s"),),
        "recipe": {"method": "ties", "scale": 1e20, "density": 1e-7, "seed": None},
        "settings": {"seed": "18446744073709551615", "trains": "both"},
        "codec": {"name": "sparse-ternary", "density": 0.05},
        "scores": {"truncation_error": 0.25, "similarity": None},
        "output": Output(
            adapter_hash=f"{server_round:064x}", artifact="33" * 32, size_bytes=1 << 40
        ),
        **changes,
    }
    return Receipt(**given)


def chain(length: int, key: Any = KEY) -> list[bytes]:
    found: list[bytes] = []
    for server_round in range(1, length + 1):
        previous = receipt_hash(found[-1]) if found else None
        found.append(encode_receipt(one(server_round, previous), key))
    return found


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(WireError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_golden_bytes_verify_for_ever() -> None:
    data = GOLDEN.read_bytes()
    assert receipt_hash(data) == "3b32069f469a5de6fb46b4f00815229fdf776dd850a3ead86daa9c5b7a27e260"
    receipt = decode_receipt(data, RING)
    assert receipt == one(signer=KEY.public.id.hex())
    assert encode_receipt(receipt, KEY) == data
    # Whoever has another implementation of RFC 8785 and Ed25519 finds this.
    inner = data.removeprefix(b'{"receipt":').rpartition(b',"signature"')[0]
    signature = bytes.fromhex(json.loads(data)["signature"])
    assert KEY.public.verifies(signature, b"anabranch.receipt/1\0" + inner)
    assert hashlib.sha256(data).hexdigest() == receipt_hash(data)


def test_an_unsigned_federation_has_unsigned_receipts_that_say_so() -> None:
    data = encode_receipt(one(), None)
    assert decode_receipt(data, None).signer is None
    assert data.endswith(b',"signature":null}')
    assert refused(lambda: decode_receipt(data, RING)) == "unsigned"
    # A signature that was taken away leaves its signer's name.
    signed = parse_canonical(encode_receipt(one(), KEY), LIMIT_BYTES)
    assert refused(lambda: decode_receipt(canonical({**signed, "signature": None}), None)) == (
        "unsigned"
    )


@pytest.mark.parametrize(
    ("ring", "code"),
    [
        (KeyRing({}), "unknown-key"),
        (KeyRing(by_id([OTHER.public])), "unknown-key"),
        (KeyRing(by_id([KEY.public]), by_id([KEY.public])), "revoked-key"),
    ],
)
def test_a_stranger_s_signature_does_not_count(ring: KeyRing, code: str) -> None:
    assert refused(lambda: decode_receipt(encode_receipt(one(), KEY), ring)) == code


def test_another_key_under_the_signers_name_is_a_bad_signature() -> None:
    body = one(signer=KEY.public.id.hex()).model_dump(mode="json")
    forged = OTHER.sign(RECEIPT + canonical(body)).hex()
    data = canonical({"receipt": body, "signature": forged})
    assert refused(lambda: decode_receipt(data, RING)) == "bad-signature"
    # A plan or a message of the same bytes is none either.
    for prefix in (b"", b"anabranch.plan/1\0", b"anabranch.message/1\0"):
        signature = KEY.sign(prefix + canonical(body)).hex()
        data = canonical({"receipt": body, "signature": signature})
        assert refused(lambda data=data: decode_receipt(data, RING)) == "bad-signature"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"format": 2}, "version"),
        ({"format": "1"}, "version"),
        ({"format": None}, "version"),
        ({"round": 0}, "receipt"),
        ({"round": "1"}, "receipt"),
        ({"round": True}, "receipt"),
        ({"kind": "gift"}, "receipt"),
        ({"base_hash": "AB" * 32}, "receipt"),
        ({"start_hash": "ab" * 32 + "\n"}, "receipt"),
        ({"time_s": "1764331234"}, "receipt"),
        ({"time_s": -1}, "receipt"),
        ({"extra": 1}, "receipt"),
        ({"federation": ""}, "receipt"),
        ({"federation": "x" * 201}, "receipt"),
        ({"inputs": [{"client": "a"}]}, "receipt"),
        ({"inputs": None}, "receipt"),
        ({"output": {}}, "receipt"),
        ({"reason": "x" * 1001}, "receipt"),
        ({"scores": {"loss": "low"}}, "receipt"),
    ],
)
def test_what_a_signer_may_not_say_is_refused(changes: dict[str, Any], code: str) -> None:
    body = {**one(signer=KEY.public.id.hex()).model_dump(mode="json"), **changes}
    data = canonical({"receipt": body, "signature": KEY.sign(RECEIPT + canonical(body)).hex()})
    assert refused(lambda: decode_receipt(data, RING)) == code


def test_a_field_left_out_is_not_filled_in() -> None:
    body = one(signer=KEY.public.id.hex()).model_dump(mode="json")
    for name in body:
        rest = {key: value for key, value in body.items() if key != name}
        data = canonical({"receipt": rest, "signature": KEY.sign(RECEIPT + canonical(rest)).hex()})
        code = "version" if name == "format" else "unsigned" if name == "signer" else "receipt"
        found = refused(lambda data=data: decode_receipt(data, RING))
        assert found in (code, "receipt"), name


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"[]", "receipt"),
        (b"{}", "receipt"),
        (b'{"receipt":{},"signature":null}', "version"),
        (b'{"receipt":[],"signature":null}', "receipt"),
        (b'{"extra":1,"receipt":{},"signature":null}', "receipt"),
        (b'{"receipt":{"format":1},"signature":null}', "receipt"),
        (b" " * (LIMIT_BYTES + 1), "too-large"),
    ],
)
def test_what_is_no_receipt_is_refused(data: bytes, code: str) -> None:
    assert refused(lambda: decode_receipt(data, None)) == code


def test_a_signature_that_is_none_is_refused() -> None:
    value = parse_canonical(encode_receipt(one(), KEY), LIMIT_BYTES)
    for odd in ("", "00", "zz" * 64, value["signature"].upper(), 7, [], "ab" * 65):
        data = canonical({**value, "signature": odd})
        assert refused(lambda data=data: decode_receipt(data, None)) == "receipt"


def test_pretty_printing_is_not_canonical() -> None:
    data = json.dumps(json.loads(encode_receipt(one(), KEY)), indent=2).encode()
    assert refused(lambda: decode_receipt(data, None)) == "canonical"


def test_the_writer_keeps_the_readers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_receipt(one(), KEY)
    monkeypatch.setattr(receipt_module, "LIMIT_BYTES", len(whole))
    assert encode_receipt(one(), KEY) == whole
    monkeypatch.setattr(receipt_module, "LIMIT_BYTES", len(whole) - 1)
    with pytest.raises(ValueError, match="over the limit"):
        encode_receipt(one(), KEY)


def test_twenty_thousand_clients_fit() -> None:
    def size_bytes(count: int) -> int:
        inputs = tuple(
            Input(
                client=f"{index:0100d}", round=100_000, artifact="11" * 32, size_bytes=2 << 20,
                nonce="00" * 16, weight=-1 / 30_001,
            )
            for index in range(count)
        )  # fmt: skip
        return len(encode_receipt(one(inputs=inputs), KEY))

    each = (size_bytes(20) - size_bytes(10)) / 10
    assert size_bytes(10) + 20_000 * each < LIMIT_BYTES


def test_a_chain_is_read_from_the_first_on() -> None:
    found = chain(4)
    assert [row.round for row in check_chain(found, RING)] == [1, 2, 3, 4]
    assert check_chain([], RING) == []


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda rows: rows[1:], 1),
        (lambda rows: [rows[0], rows[2], rows[3]], 2),
        (lambda rows: [rows[0], rows[2], rows[1], rows[3]], 2),
        (lambda rows: [rows[0], rows[0]], 2),
        (lambda rows: [*rows, rows[3]], 5),
        # Written again by the same key: the one after it still names the first.
        (lambda rows: [encode_receipt(one(1, reason="x"), KEY), *rows[1:]], 2),
        (
            lambda rows: [
                rows[0],
                encode_receipt(one(2, receipt_hash(rows[0]), run="another"), KEY),
            ],
            2,
        ),
        (
            lambda rows: [
                rows[0],
                encode_receipt(one(2, receipt_hash(rows[0]), start_hash="77" * 32), KEY),
            ],
            2,
        ),
    ],
)
def test_a_chain_with_one_missing_moved_or_changed_is_broken(
    damage: Callable[[list[bytes]], list[bytes]], place: int
) -> None:
    with pytest.raises(WireError, match=f"receipt {place}: ") as caught:
        check_chain(damage(chain(4)), RING)
    assert caught.value.code == "chain"


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_no_update_is_merged_twice_or_before_it_is_made(odd: int) -> None:
    """Client a's update of round 1 came in round 1 already; of 2 it comes late; 3 is yet to be."""
    found = chain(1)
    inputs = (Input(client="a", round=odd, artifact="44" * 32, size_bytes=1),)
    found.append(encode_receipt(one(2, receipt_hash(found[0]), inputs=inputs), KEY))
    if odd == 2:
        assert len(check_chain(found, RING)) == 2
        return
    with pytest.raises(WireError, match=f"the update of a of round {odd} once too often") as caught:
        check_chain(found, RING)
    assert caught.value.code == "chain"
    # In an abandoned round it only waits, and a withdrawal merges again.
    for kind in ("abandoned", "withdrawal"):
        changes = {"kind": kind, "inputs": inputs}
        found[1] = encode_receipt(one(2, receipt_hash(found[0]), **changes), KEY)
        assert len(check_chain(found, RING)) == 2


def test_a_rollback_and_an_abandoned_round_stand_in_the_chain() -> None:
    found = chain(2)
    kept = {"inputs": (), "exclusions": (), "recipe": {}, "codec": {}, "scores": {}}
    abandoned = one(
        3, receipt_hash(found[-1]), kind="abandoned", output=None, reason="1 admitted", **kept
    )
    found.append(encode_receipt(abandoned, KEY))
    back = one(
        4, receipt_hash(found[-1]), kind="rollback", start_hash=f"{2:064x}",
        output=one(1).output, restored=Restored(round=1, receipt=receipt_hash(found[0])), **kept,
    )  # fmt: skip
    found.append(encode_receipt(back, KEY))
    found.append(encode_receipt(one(5, receipt_hash(found[-1]), start_hash=f"{1:064x}"), KEY))
    kinds = [row.kind for row in check_chain(found, RING)]
    assert kinds == ["merge", "merge", "abandoned", "rollback", "merge"]


@given(st.data())
def test_no_changed_byte_is_taken(data: st.DataObject) -> None:
    whole = bytearray(GOLDEN.read_bytes())
    index = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[index]))
    whole[index] = value
    refused(lambda: decode_receipt(bytes(whole), RING))


@given(st.binary(max_size=40), st.integers(0, 1500), st.integers(0, 40))
def test_no_splice_is_taken(piece: bytes, start: int, length: int) -> None:
    whole = GOLDEN.read_bytes()
    spliced = whole[:start] + piece + whole[start + length :]
    if spliced != whole:
        refused(lambda: decode_receipt(spliced, RING))
