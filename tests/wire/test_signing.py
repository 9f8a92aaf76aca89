"""Signatures under messages and plans: what verifies, and every reason why one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from anabranch.wire import CodecConfig, UpdateMeta, WireError, decode_update, encode_update
from anabranch.wire.header import read_manifest
from anabranch.wire.keys import PublicKey, by_id, seeded_key
from anabranch.wire.manifest import Manifest
from anabranch.wire.signing import KeyRing, check_message, check_plan, sign_plan
from anabranch.wire.v1 import update_pb2 as pb

SITE, OTHER = seeded_key("client-03", 1), seeded_key("client-04", 1)
RING = KeyRing(by_id([SITE.public, OTHER.public]))
CODEC = CodecConfig(density=0.1)
GOLDEN = Path(__file__).parent / "golden" / "v1-signed.bin"


@pytest.fixture
def blob(small: dict[str, Tensor], meta: UpdateMeta) -> bytes:
    return encode_update(small, meta, CODEC, SITE).blob


def refused(check: Callable[[], object]) -> str:
    with pytest.raises(WireError) as caught:
        check()
    return caught.value.code


def test_rfc_8032_signs_and_verifies() -> None:
    # Test 2 of section 7.1.
    public = PublicKey(
        "a", bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    )
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert public.verifies(signature, b"\x72")
    assert not public.verifies(signature, b"\x73")
    assert not public.verifies(signature[:-1], b"\x72")


def test_a_signed_message_verifies_and_decodes(
    blob: bytes, small: dict[str, Tensor], meta: UpdateMeta
) -> None:
    layout = {name: tuple(tensor.shape) for name, tensor in small.items()}
    seen: list[Manifest] = []

    def check(manifest: Manifest) -> None:
        check_message(manifest, RING, "client-03")
        seen.append(manifest)

    got, tensors = decode_update(blob, layout, check)
    assert got == meta
    assert sorted(tensors) == sorted(small)
    assert seen[0].key_id == SITE.public.id
    # Key id and signature, and nothing else: 2 + 16 and 3 + 64 bytes, plus zstd's own slack.
    assert 80 <= len(blob) - len(encode_update(small, meta, CODEC).blob) <= 96


def test_the_same_key_signs_the_same_message_alike(
    small: dict[str, Tensor], meta: UpdateMeta
) -> None:
    assert seeded_key("a", 7).public == seeded_key("a", 7).public
    assert seeded_key("a", 7).public.raw != seeded_key("a", 8).public.raw
    blobs = {encode_update(small, meta, CODEC, seeded_key("client-03", 1)).blob for _ in range(2)}
    assert len(blobs) == 1


@pytest.mark.parametrize(
    ("ring", "code"),
    [
        (KeyRing({}), "unknown-key"),
        (KeyRing(RING.enrolled, by_id([SITE.public])), "revoked-key"),
        (KeyRing(by_id([dataclasses.replace(SITE.public, name="client-09")])), "wrong-key"),
    ],
)
def test_a_key_that_does_not_count_is_refused(blob: bytes, ring: KeyRing, code: str) -> None:
    assert refused(lambda: check_message(read_manifest(blob), ring, "client-03")) == code


def test_an_unsigned_message_is_refused(small: dict[str, Tensor], meta: UpdateMeta) -> None:
    manifest = read_manifest(encode_update(small, meta, CODEC).blob)
    assert refused(lambda: check_message(manifest, RING)) == "unsigned"


def _other_payload(manifest: pb.Manifest, payloads: list[bytes]) -> None:
    payloads[0] = bytes(len(payloads[0]))  # the forge makes the digest agree


FIELDS: dict[str, Callable[[pb.Manifest, list[bytes]], object]] = {
    "federation": lambda m, _: setattr(m, "federation", "x"),
    "run": lambda m, _: setattr(m, "run", "x"),
    "round": lambda m, _: setattr(m, "round", 4),
    "client": lambda m, _: setattr(m, "client", "client-04"),
    "base": lambda m, _: setattr(m, "base_hash", bytes(32)),
    "start": lambda m, _: setattr(m, "start_hash", bytes(32)),
    "nonce": lambda m, _: setattr(m, "nonce", bytes(16)),
    "issued": lambda m, _: setattr(m, "issued_s", 1),
    "seed": lambda m, _: setattr(m, "a0_seed", 1),
    "examples": lambda m, _: setattr(m, "examples", 1),
    "codec": lambda m, _: setattr(m, "codec", "dense"),
    "kind": lambda m, _: setattr(m, "kind", pb.KIND_ADAPTER),
    "scale": lambda m, _: m.frames[0].scales.__setitem__(0, 9.0),
    "payload": _other_payload,
    "signature": lambda m, _: setattr(m, "signature", bytes(64)),
    "short": lambda m, _: setattr(m, "signature", m.signature[:-1]),
    "key": lambda m, _: setattr(m, "key_id", OTHER.public.id),
}


@pytest.mark.parametrize("field", FIELDS)
def test_any_change_breaks_the_signature(
    blob: bytes, field: str, forge: Callable[..., bytes]
) -> None:
    manifest = read_manifest(forge(blob, FIELDS[field]))
    assert refused(lambda: check_message(manifest, RING)) == "bad-signature"


def test_a_signature_must_stand_at_the_end(blob: bytes, forge: Callable[..., bytes]) -> None:
    tail = b"\xfa\x01\x40"

    def moved(raw: bytes) -> bytes:
        at = raw.rindex(tail)
        return raw[at:] + raw[:at]

    def followed(raw: bytes) -> bytes:
        return raw + b"\x28\x07"  # round = 7

    for damage in (moved, followed):
        manifest = read_manifest(forge(blob, lambda *_: None, damage=damage))
        assert manifest.signature
        assert refused(lambda m=manifest: check_message(m, RING)) == "bad-signature"  # type: ignore[misc]


def test_a_plan_is_signed_as_text_and_under_its_own_prefix() -> None:
    key_id, text = SITE.public.id, '{"round": 1}'
    signature = sign_plan(text, SITE)
    check_plan(text, key_id, signature, RING)
    assert refused(lambda: check_plan('{"round": 2}', key_id, signature, RING)) == "bad-signature"
    assert refused(lambda: check_plan(text, key_id, b"", RING)) == "unsigned"
    assert refused(lambda: check_plan(text, bytes(16), signature, RING)) == "unknown-key"
    bare = SITE.sign(text.encode())
    assert refused(lambda: check_plan(text, key_id, bare, RING)) == "bad-signature"


def test_golden_signed_bytes_verify_for_ever(small: dict[str, Tensor], meta: UpdateMeta) -> None:
    blob = GOLDEN.read_bytes()
    layout = {name: tuple(tensor.shape) for name, tensor in small.items()}
    got, _ = decode_update(blob, layout, lambda manifest: check_message(manifest, RING))
    assert got == meta
