"""Importance in an update: what comes back, what it costs, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anabranch.wire import (
    CodecConfig,
    UpdateMeta,
    WireError,
    decode_forms,
    decode_update,
    encode_update,
    read_manifest,
)
from anabranch.wire.v1 import update_pb2 as pb

CODECS = [CodecConfig(density=0.1), CodecConfig(name="dense", dtype="bf16")]
Forge = Callable[[bytes, Callable[[pb.Manifest, list[bytes]], object]], bytes]
Layout = dict[str, tuple[int, ...]]


@pytest.fixture
def fisher() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "a.importance_columns": torch.randn(50, generator=generator).square() * 1e-9,
        "a.importance_rows": torch.randn(6, generator=generator).pow(6),
        "b.gap": torch.randn(900, generator=generator).square(),
        "d.scalar": torch.tensor(0.25),
    }


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_importance_comes_back_as_squares_of_levels(
    small: dict[str, Tensor], fisher: dict[str, Tensor], meta: UpdateMeta, codec: CodecConfig
) -> None:
    plain = encode_update(small, meta, codec)
    weighed = encode_update(small, meta, codec, importance=fisher)
    got, forms, importance = decode_forms(weighed.blob, layout_of(small), layout_of(fisher))
    assert got == meta
    assert all(torch.equal(forms[name].dense(), plain.sent[name]) for name in small)
    assert list(importance) == sorted(fisher)
    for name, part in importance.items():
        assert bool((part >= 0).all())
        root, wanted = part.sqrt(), fisher[name].sqrt()
        torch.testing.assert_close(root, wanted, atol=float(wanted.max()) / 253, rtol=0)
    manifest = read_manifest(weighed.blob)
    # A byte an entry, and the scales of its blocks of 64.
    payload = sum(frame.payload_bytes for frame in manifest.importance)
    assert payload == (50 + 6 + 900 + 1) + 4 * (1 + 1 + 15 + 1)


def test_without_importance_the_message_is_what_it_was(
    small: dict[str, Tensor], meta: UpdateMeta
) -> None:
    plain = encode_update(small, meta, CODECS[0])
    assert encode_update(small, meta, CODECS[0], importance={}).blob == plain.blob
    assert decode_forms(plain.blob, layout_of(small), {})[2] == {}


def test_a_senders_mistake_is_a_value_error(small: dict[str, Tensor], meta: UpdateMeta) -> None:
    for bad, reason in ((-1e-9, "a: importance is below zero"), (torch.nan, "a: the tensor holds")):
        with pytest.raises(ValueError, match=reason):
            encode_update(small, meta, CODECS[0], importance={"a": torch.tensor([1.0, bad])})


def negative(payload: bytes) -> bytes:
    return payload[:-1] + b"\x81"


def overflowing(payload: bytes) -> bytes:
    return torch.full((18,), 1e30).numpy().tobytes() + payload[72:]


def not_finite(payload: bytes) -> bytes:
    return torch.full((18,), torch.inf).numpy().tobytes() + payload[72:]


@pytest.mark.parametrize(
    ("code", "change", "payload"),
    [
        ("importance", lambda m: None, negative),
        ("importance", lambda m: None, overflowing),
        ("values", lambda m: None, not_finite),
        ("counts", lambda m: None, lambda p: p[:-1]),
        ("codec", lambda m: setattr(m.importance[0], "codec", 2), bytes),
        ("layout", lambda m: m.importance[0].names.__setitem__(0, "other"), bytes),
        ("layout", lambda m: m.importance[0].dims.__setitem__(0, 49), bytes),
        ("digest", lambda m: setattr(m.importance[0], "digest", bytes(16)), bytes),
    ],
)
def test_impossible_importance_is_refused(
    small: dict[str, Tensor],
    fisher: dict[str, Tensor],
    meta: UpdateMeta,
    code: str,
    change: Callable[[pb.Manifest], object],
    payload: Callable[[bytes], bytes],
    forge: Forge,
) -> None:
    blob = encode_update(small, meta, CODECS[0], importance=fisher).blob

    def apply(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        change(manifest)
        payloads[-1] = payload(payloads[-1])
        # The frame's own count is made to agree, as an attacker would; the scalar has no dims.
        manifest.importance[0].entries = sum(manifest.importance[0].dims) + 1

    with pytest.raises(WireError) as caught:
        decode_forms(forge(blob, apply), layout_of(small), layout_of(fisher))
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_importance_is_there_if_and_only_if_it_is_asked_for(
    small: dict[str, Tensor], fisher: dict[str, Tensor], meta: UpdateMeta
) -> None:
    layout = layout_of(small)
    weighed = encode_update(small, meta, CODECS[0], importance=fisher).blob
    plain = encode_update(small, meta, CODECS[0]).blob
    with pytest.raises(WireError, match="missing") as caught:
        decode_forms(plain, layout, layout_of(fisher))
    assert caught.value.code == "importance"
    with pytest.raises(WireError) as caught:
        decode_update(weighed, layout)
    assert caught.value.code in ("importance", "too-large")


def test_random_damage_is_refused_or_decodes_to_what_is_admissible(
    small: dict[str, Tensor], fisher: dict[str, Tensor], meta: UpdateMeta, forge: Forge
) -> None:
    blob = encode_update(small, meta, CODECS[0], importance=fisher).blob
    source, codes = random.Random(3), set()

    def damage(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        damaged = bytearray(payloads[-1])
        for _ in range(source.choice([1, 1, 4])):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        payloads[-1] = bytes(damaged)

    for _ in range(400):
        try:
            _, _, found = decode_forms(forge(blob, damage), layout_of(small), layout_of(fisher))
        except WireError as error:
            codes.add(error.code)
        else:
            codes.add("decoded")
            assert all(bool((p.isfinite() & (p >= 0)).all()) for p in found.values())
    assert codes == {"decoded", "importance", "values"}
