"""What each codec loses, what it costs, and what of it is refused."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.wire import CodecConfig, UpdateMeta, WireError, decode_update, encode_update, zstd
from anabranch.wire import read_manifest as manifest_of
from anabranch.wire.codecs.rotated import blocks_of
from anabranch.wire.codecs.support import DRAWS, MASK, RUNS
from anabranch.wire.v1 import update_pb2 as pb

ENTRIES = 1 << 16
Forge = Callable[..., bytes]


def _normal(entries: int = ENTRIES, seed: int = 4) -> Tensor:
    return torch.randn(entries, generator=torch.Generator().manual_seed(seed))


def _error(x: Tensor, meta: UpdateMeta, codec: CodecConfig) -> float:
    """Squared error of what is sent, over the squared norm."""
    sent = encode_update({"x": x}, meta, codec).sent["x"]
    return float((sent - x).square().sum() / x.square().sum())


# Max (1960), table I; the sign of a normal variable alone leaves 1 - 2/pi.
@pytest.mark.parametrize(
    ("bits", "loss"),
    [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.00349), (8, 8.69e-5)],
)
@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_a_rotated_tensor_loses_what_a_normal_law_does(
    bits: int, loss: float, spread: float, meta: UpdateMeta
) -> None:
    # Entries of very different sizes: only the rotation makes them alike.
    x = _normal() * torch.exp(spread * _normal(seed=5))
    codec = CodecConfig(name="rotated", bits=bits)
    assert _error(x, meta, codec) == pytest.approx(loss, rel=0.07 if spread else 0.04)
    blob = encode_update({"x": x}, meta, codec).blob
    share = 8 * manifest_of(blob).payload_bytes / ENTRIES
    # The entropy of the codes: 1.911 bits of two, 2.825 of three, 3.765 of four (Max, table I).
    assert share < {1: 1.01, 2: 1.95, 3: 2.87, 4: 3.81, 5: 4.53, 8: 7.2}[bits]


def test_blocks_are_powers_of_two_and_cover_all() -> None:
    for entries in (0, 1, 3, 4095, 4096, 4097, 12_345):
        sizes = [block.stop - block.start for block in blocks_of(entries)]
        assert sum(sizes) == entries
        assert all(size & (size - 1) == 0 for size in sizes)
        assert len(sizes) <= entries // 4096 + 12


def test_signs_lose_what_the_mean_magnitude_leaves(meta: UpdateMeta) -> None:
    x = _normal()
    sent = encode_update({"x": x}, meta, CodecConfig(name="sign")).sent["x"]
    assert torch.equal(sent < 0, x < 0)
    assert torch.allclose(sent.abs(), x.abs().mean())
    assert _error(x, meta, CodecConfig(name="sign")) == pytest.approx(1 - 2 / math.pi, rel=0.02)


def test_two_magnitudes_are_the_best_two(meta: UpdateMeta) -> None:
    x = _normal(300)
    sent = encode_update({"x": x}, meta, CodecConfig(name="two-bit", density=0.1)).sent["x"]
    kept = x.abs().topk(30)
    assert set(sent.nonzero().flatten().tolist()) == set(kept.indices.tolist())
    values = sorted(kept.values.double().tolist())
    best = min(
        sum((v - sum(part) / len(part)) ** 2 for part in (values[:cut], values[cut:]) for v in part)
        for cut in range(1, 30)
    )
    mine = (sent - x)[kept.indices].double().square().sum()
    assert float(mine) == pytest.approx(best, rel=1e-5)
    ternary = encode_update({"x": x}, meta, CodecConfig(density=0.1)).sent["x"]
    assert mine < 0.5 * (ternary - x)[kept.indices].square().sum()


def test_random_drops_are_unbiased_and_differ_between_clients(meta: UpdateMeta) -> None:
    x = _normal(4096)
    codec = CodecConfig(name="dare", density=0.25, feedback=0)
    total = torch.zeros(4096)
    for number in range(400):
        one = UpdateMeta(**{**vars(meta), "client": f"c{number}"})
        total += encode_update({"x": x}, one, codec).sent["x"]
    # One draw has variance 3 x², the mean of 400 therefore .0075.
    assert float((total / 400 - x).square().mean()) == pytest.approx(0.0075, rel=0.1)
    blob = encode_update({"x": x}, meta, codec).blob
    # 8.5 bits for each of a quarter, and no mask.
    assert 8 * manifest_of(blob).payload_bytes / 4096 == pytest.approx(8.5 / 4, rel=0.05)


@given(
    st.integers(1, 3000),
    st.sampled_from([0.001, 0.01, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_supports_come_back(entries: int, density: float, seed: int) -> None:
    kept = np.random.default_rng(seed).random(entries) < density
    kept[seed % entries] = True
    positions = np.flatnonzero(kept)
    for support in (RUNS, DRAWS, MASK):
        packed = support.pack(positions, entries)
        if packed is not None:
            blob, raw_bytes = packed
            found = support.unpack(memoryview(blob), raw_bytes, positions.size, entries)
            assert np.array_equal(found, positions)


@pytest.mark.parametrize(
    ("entries", "density", "number", "excess"),
    [
        (16_384, 0.1, pb.CODEC_TERNARY_DRAWS, 1.01),
        (ENTRIES, 0.02, pb.CODEC_TERNARY_DRAWS, 1.01),
        (1 << 20, 0.1, pb.CODEC_TERNARY, 1.015),
        (ENTRIES, 0.8, pb.CODEC_TERNARY_MASK, 1.02),
    ],
)
def test_a_frame_takes_the_smallest_packing_near_the_entropy(
    entries: int, density: float, number: int, excess: float, meta: UpdateMeta
) -> None:
    blob = encode_update({"x": _normal(entries)}, meta, CodecConfig(density=density)).blob
    (frame,) = manifest_of(blob).frames
    assert frame.codec == number
    share = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert frame.payload_bytes * 8 <= excess * entries * (share + density)


def coded(*symbols: int) -> bytes:
    return zstd.compress_symbols(bytes(symbols))


def _to(payload: bytes) -> Callable[[pb.Manifest, list[bytes]], None]:
    def change(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        payloads[0] = payload
        if manifest.codec != "rotated-3":
            manifest.frames[0].raw_bytes = len(payload)

    return change


NAN, MINUS, HUGE = (np.float32(value).tobytes() for value in (np.nan, -1.0, 3e38))


@pytest.mark.parametrize(
    ("codec", "payload", "code"),
    [
        (CodecConfig(name="sign"), NAN + b"\0", "values"),
        (CodecConfig(name="sign"), MINUS + b"\0", "values"),
        (CodecConfig(name="sign"), bytes(4) + b"\x20", "payload"),
        (CodecConfig(name="sign"), bytes(4), "counts"),
        (CodecConfig(name="rotated", bits=3), NAN + bytes(4) + coded(0, 0, 0), "values"),
        (CodecConfig(name="rotated", bits=3), HUGE + bytes(4) + coded(0, 0, 0), "values"),
        (CodecConfig(name="rotated", bits=3), bytes(8) + coded(0, 0, 0x40), "payload"),
        (CodecConfig(name="rotated", bits=3), bytes(8) + coded(0, 0, 0x08), "payload"),
        (CodecConfig(name="rotated", bits=3), bytes(8) + b"\0\0\0", "payload"),
        (CodecConfig(name="dense", dtype="int4"), bytes(4) + b"\x08\0\0", "values"),
        (CodecConfig(name="dense", dtype="int4"), bytes(4) + b"\0\0\x70", "payload"),
        (CodecConfig(name="dense", dtype="int4"), HUGE + bytes(3), "values"),
        (CodecConfig(name="dare", density=1, feedback=0), b"\xff", "payload"),
        (CodecConfig(name="dare", density=1, feedback=0), b"\xff" * 4 + NAN + bytes(5), "values"),
        (CodecConfig(name="dare", density=1, feedback=0), b"\xff" * 4 + bytes(8), "counts"),
    ],
)  # fmt: skip
def test_payloads_that_cannot_be_are_refused(
    codec: CodecConfig, payload: bytes, code: str, meta: UpdateMeta, forge: Forge
) -> None:
    blob = encode_update({"x": torch.ones(5)}, meta, codec).blob
    with pytest.raises(WireError) as caught:
        decode_update(forge(blob, _to(payload)), {"x": (5,)})
    assert caught.value.code == code


def test_draws_that_are_left_over_are_refused(meta: UpdateMeta, forge: Forge) -> None:
    blob = encode_update({"x": _normal(4000)}, meta, CodecConfig(density=0.01)).blob
    assert manifest_of(blob).frames[0].codec == pb.CODEC_TERNARY_DRAWS
    for extra in (b"\0" * 4, b"\1\0\0\0", b"\1"):

        def lengthen(manifest: pb.Manifest, payloads: list[bytes], extra: bytes = extra) -> None:
            payloads[0] = extra + payloads[0]

        with pytest.raises(WireError) as caught:
            decode_update(forge(blob, lengthen), {"x": (4000,)})
        assert caught.value.code in ("payload", "counts")


def test_two_magnitudes_in_the_wrong_order_are_refused(meta: UpdateMeta, forge: Forge) -> None:
    blob = encode_update({"x": _normal(400)}, meta, CodecConfig(name="two-bit", density=0.1)).blob

    def swap(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        manifest.frames[0].scales[0] = 1e6

    with pytest.raises(WireError, match="magnitudes") as caught:
        decode_update(forge(blob, swap), {"x": (400,)})
    assert caught.value.code == "values"
