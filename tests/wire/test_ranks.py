"""Ranks: what they say, in how many bits, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.wire import CodecConfig, UpdateMeta, WireError, decode_update, encode_update
from anabranch.wire import read_manifest as manifest_of
from anabranch.wire.codecs.permutation import pack, packed_bytes, unpack
from anabranch.wire.codecs.ranks import RANKS
from anabranch.wire.v1 import update_pb2 as pb

Forge = Callable[..., bytes]
CODEC = CodecConfig(name="ranks")


def _normal(entries: int, seed: int = 4) -> Tensor:
    return torch.randn(entries, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 2**31))
def test_permutations_come_back(entries: int, seed: int) -> None:
    places_n = np.random.default_rng(seed).permutation(entries)
    packed = pack(places_n)
    assert len(packed) == packed_bytes(entries)
    assert np.array_equal(unpack(memoryview(packed), entries), places_n)


@pytest.mark.parametrize("entries", [3072, 4096, 70_001])
def test_they_take_little_more_than_log2_of_n_factorial(entries: int) -> None:
    least = math.lgamma(entries + 1) / math.log(2)
    assert least < 8 * packed_bytes(entries) < 1.03 * least


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.data())
def test_whatever_is_read_is_a_permutation_and_has_one_spelling(
    entries: int, data: st.DataObject
) -> None:
    size = packed_bytes(entries)
    packed = data.draw(st.binary(min_size=size, max_size=size))
    try:
        places_n = unpack(memoryview(packed), entries)
    except WireError:
        return
    assert sorted(places_n.tolist()) == list(range(entries))
    assert pack(places_n) == packed


def test_a_small_permutation_is_these_bytes() -> None:
    """By hand: 17 places are halved once, into 8 and 9."""
    places = [16, *range(16)]
    halves = [place >= 8 for place in places]
    first = sum(bit << at for at, bit in enumerate(halves)).to_bytes(3, "little")
    # 8 in order are number 0, of 16 bits; 8 behind the last of 9 are number 8 * 8!, of 19 bits.
    number = 8 * math.factorial(8)
    assert pack(np.array(places)) == first + bytes(2) + number.to_bytes(3, "little")


def test_signs_and_ranks_travel_and_sizes_do_not(meta: UpdateMeta) -> None:
    x = _normal(600).reshape(20, 30)
    x[3] = 0
    sent = encode_update({"x": x}, meta, CODEC).sent["x"]
    assert torch.equal(sent.sign(), x.sign())
    order = x.abs().flatten().argsort(stable=True)[30:]
    ranks = sent.abs().flatten()[order]
    step = float(ranks[-1]) / 600
    torch.testing.assert_close(ranks, torch.arange(31.0, 601) * step)
    # The step is the one of least squares.
    worth = torch.where(x.abs() > 0, sent / step, 0.0).double()
    assert step == pytest.approx(float((worth * x).sum() / worth.square().sum()), rel=1e-6)
    # Nothing else is told apart: any growing function of the magnitudes gives the same ranks.
    grown = encode_update({"x": x.sign() * x.abs().exp() * (x != 0)}, meta, CODEC).sent["x"]
    assert torch.equal(grown.abs().flatten().argsort()[30:], sent.abs().flatten().argsort()[30:])
    again = encode_update({"x": 1000 * x}, meta, CODEC).sent["x"]
    torch.testing.assert_close(again, 1000 * sent)


def test_equals_are_ranked_by_chance_and_by_none_twice_alike(meta: UpdateMeta) -> None:
    x = torch.ones(500)
    one = encode_update({"x": x}, meta, CODEC).sent["x"]
    other = encode_update({"x": x}, UpdateMeta(**{**vars(meta), "client": "b"}), CODEC).sent["x"]
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.2
    place = torch.arange(500.0)
    assert abs(float(torch.corrcoef(torch.stack([one, place]))[0, 1])) < 0.2


def test_forms_say_their_norm_and_survive_the_wire(
    meta: UpdateMeta, small: dict[str, Tensor]
) -> None:
    encoded = encode_update(small, meta, CODEC)
    layout = {name: tuple(tensor.shape) for name, tensor in small.items()}
    _, decoded = decode_update(encoded.blob, layout)
    for name, tensor in small.items():
        assert torch.equal(decoded[name], encoded.sent[name])
        assert torch.equal(decoded[name].sign(), tensor.sign())
        form = RANKS.reduce(tensor, CODEC, 7)
        assert form.norm() == pytest.approx(float(form.dense().double().norm()), rel=1e-6)
        # A contraction, as error feedback asks.
        assert float((decoded[name] - tensor).norm()) <= float(tensor.norm())
    (frame,) = manifest_of(encoded.blob).frames
    assert frame.codec == pb.CODEC_RANKS
    sizes = [tensor.numel() for tensor in small.values()]
    assert frame.payload_bytes == sum(8 + packed_bytes(n) + -(-n // 8) for n in sizes)


def head(step: float, zeros: int) -> bytes:
    return np.float32(step).tobytes() + zeros.to_bytes(4, "little")


def swap(first: int, second: int) -> bytes:
    """Two of twenty entries lie in other halves than the rest say."""
    packed = bytearray(pack(np.arange(20)))
    packed[first // 8] ^= 1 << first % 8
    packed[second // 8] ^= 1 << second % 8
    return bytes(packed)


SOUND = pack(np.arange(20))
ORDERS = (math.factorial(10)).to_bytes(3, "little")


@pytest.mark.parametrize(
    ("payload", "code", "reason"),
    [
        (head(1, 0) + swap(0, 1) + bytes(3), "payload", "no permutation"),
        (head(1, 0) + SOUND[:3] + ORDERS + SOUND[6:] + bytes(3), "payload", "no order"),
        (head(1, 0) + SOUND + bytes(4), "counts", "claims"),
        (head(1, 0) + SOUND[:-1] + bytes(3), "counts", "claims"),
        (head(1, 0) + SOUND + b"\0\0\x10", "payload", "after the last"),
        (head(1, 0) + SOUND[:2] + b"\x1f" + SOUND[3:] + bytes(3), "payload", "after the last"),
        (head(math.nan, 0) + SOUND + bytes(3), "values", "is worth nan"),
        (head(-1, 0) + SOUND + bytes(3), "values", "is worth -1"),
        (head(3e38, 0) + SOUND + bytes(3), "values", "is worth 3"),
        (head(1, 21) + SOUND + bytes(3), "values", "21 zeros of 20"),
        (head(0, 3) + SOUND + bytes(3), "values", "3 zeros of 20 at step 0"),
        (head(1, 20) + SOUND + bytes(3), "values", "20 zeros of 20 at step 1"),
        (head(1, 3) + SOUND + b"\x04\0\0", "values", "a zero of x has a sign"),
    ],
)
def test_payloads_that_cannot_be_are_refused(
    payload: bytes, code: str, reason: str, meta: UpdateMeta, forge: Forge
) -> None:
    blob = encode_update({"x": _normal(20)}, meta, CODEC).blob

    def change(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        payloads[0] = payload
        manifest.frames[0].raw_bytes = len(payload)

    with pytest.raises(WireError, match=reason) as caught:
        decode_update(forge(blob, change), {"x": (20,)})
    assert caught.value.code == code


def test_a_frame_that_claims_non_zeros_or_another_layout_is_refused(
    meta: UpdateMeta, forge: Forge
) -> None:
    blob = encode_update({"x": _normal(20)}, meta, CODEC).blob

    def sparse(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        manifest.frames[0].nonzeros.append(20)
        manifest.frames[0].scales.append(1.0)

    with pytest.raises(WireError, match="announces non-zeros"):
        decode_update(forge(blob, sparse), {"x": (20,)})
    with pytest.raises(WireError) as caught:
        decode_update(blob, {"x": (21,)})
    assert caught.value.code == "layout"


def test_a_tensor_that_is_no_number_is_not_sent(meta: UpdateMeta) -> None:
    with pytest.raises(ValueError, match=r"x: .* NaN or infinite"):
        encode_update({"x": torch.tensor([1.0, math.inf])}, meta, CODEC)
    with pytest.raises(ValueError, match=r"x: .* beyond fp32"):
        encode_update({"x": torch.full((20,), 3e38)}, meta, CODEC)
    sent = encode_update({"x": torch.tensor([1e-45, 0, 0, 0, 0, 0, 0, 0])}, meta, CODEC).sent["x"]
    assert torch.equal(sent, torch.zeros(8))
