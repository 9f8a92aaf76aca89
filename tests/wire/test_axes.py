"""Matrices turned to their axes: what is lost, what it costs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from anabranch.wire import (
    CodecConfig,
    UpdateMeta,
    WireError,
    decode_update,
    encode_update,
    read_manifest,
    zstd,
)
from anabranch.wire.codecs.axes import Axes, reduce
from anabranch.wire.v1 import update_pb2 as pb

Forge = Callable[..., bytes]


def _moving_together(seed: int = 1) -> dict[str, Tensor]:
    """Factors whose eight rows follow a few directions, B on its side."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in {"a": (8, 384), "b": (384, 8), "conv": (8, 12, 32), "bias": (384,)}.items():
        rows = torch.randn(8, 384, generator=generator) * 0.4 ** torch.arange(8)[:, None]
        x = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0] @ rows
        tensors[name] = (x[0] if name == "bias" else x.T if name == "b" else x).reshape(shape)
    return tensors


def _lost(tensors: dict[str, Tensor], sent: dict[str, Tensor]) -> float:
    error = sum(float((sent[name] - x).double().square().sum()) for name, x in tensors.items())
    return error / sum(float(x.double().square().sum()) for x in tensors.values())


@pytest.mark.parametrize("loss", [1e-6, 1e-4, 1e-2])
def test_no_more_is_lost_than_was_asked_for(loss: float, meta: UpdateMeta) -> None:
    tensors = _moving_together()
    # One step for all: what a smaller tensor loses is as much, not as much of itself.
    tensors["a"] *= 20
    encoded = encode_update(tensors, meta, CodecConfig(name="axes", loss=loss))
    # Axes along which there is less than a step has room for lose less.
    assert {1e-6: 0.95, 1e-4: 0.7, 1e-2: 0.3}[loss] < _lost(tensors, encoded.sent) / loss < 1.03
    if loss < 1e-5:
        each = [float((encoded.sent[n] - x).square().mean()) for n, x in tensors.items()]
        assert max(each) < 1.2 * min(each)


def test_what_is_sent_is_levels_turned_and_scaled() -> None:
    """Against a loop over entries."""
    for name, x in _moving_together().items():
        form = reduce(x, CodecConfig(name="axes", loss=1e-4), 0)
        assert (form.turn_rr is None) == (name == "bias")
        turn_rr = np.eye(1) * 31 if form.turn_rr is None else form.turn_rr.astype(int)
        rows, columns = form.levels_rn.shape
        expected = np.zeros((rows, columns), np.float32)
        for i in range(rows):
            for j in range(0, columns, 7):
                whole = sum(int(turn_rr[i, k]) * int(form.levels_rn[k, j]) for k in range(rows))
                expected[i, j] = np.float32(whole * form.step / 31)
        found = form.dense()
        assert found.shape == x.shape
        flat = found.T.reshape(rows, columns) if name == "b" else found.reshape(rows, columns)
        np.testing.assert_allclose(flat.numpy()[:, ::7], expected[:, ::7], rtol=1e-6)
        assert form.norm() == pytest.approx(float(found.double().norm()))


def test_rows_that_move_together_take_fewer_bits(meta: UpdateMeta) -> None:
    codec = CodecConfig(name="axes", loss=1e-4)
    together = {"a": _moving_together()["a"]}
    alone = {"a": torch.randn(8, 384, generator=torch.Generator().manual_seed(2))}
    sizes = [
        read_manifest(encode_update(x, meta, codec).blob).payload_bytes for x in (together, alone)
    ]
    # Spreads of 0.4^i: a mean of squares 24 times their geometric mean, 2.3 bits; a turn costs
    # 0.1, and rows that take a bit or less cannot go below what Huffman codes take.
    assert 8 * (sizes[1] - sizes[0]) / 3072 > 1.5
    # The rate of even steps on a normal law: log2 sqrt(2 pi e / 12 loss).
    assert 8 * sizes[1] / 3072 == pytest.approx(6.9, abs=0.35)


def test_a_turn_that_does_not_pay_is_left_out() -> None:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(3))
    assert reduce(x, CodecConfig(name="axes"), 0).turn_rr is None
    assert reduce(torch.zeros(8, 40), CodecConfig(name="axes"), 0).step == 0


def test_large_and_lonely_entries_come_back(meta: UpdateMeta) -> None:
    lonely = torch.zeros(4, 5000)
    lonely[2, 17] = 1e6
    tensors = {"lonely": lonely, "tiny": 1e-42 * torch.ones(5, 3), "one": torch.tensor(2.5)}
    codec = CodecConfig(name="axes", loss=1e-10)
    encoded = encode_update(tensors, meta, codec)
    layout = {name: tuple(x.shape) for name, x in tensors.items()}
    _, decoded = decode_update(encoded.blob, layout)
    assert all(torch.equal(decoded[name], encoded.sent[name]) for name in tensors)
    assert float((decoded["lonely"] - lonely).norm()) < 10 * 1e6
    with pytest.raises(ValueError, match="x: the tensor holds entries beyond"):
        encode_update({"x": torch.full((3, 4), 3e38)}, meta, CodecConfig(name="axes", loss=0.1))


def _spoil(at: str) -> Callable[[pb.Manifest, list[bytes]], None]:
    """Changes of a frame of one turned tensor [8, 384]."""

    def change(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        (frame,) = manifest.frames
        length = int.from_bytes(payloads[0][:4], "little")
        stream, rest = payloads[0][4 : 4 + length], payloads[0][4 + length :]
        symbols = bytearray(zstd.decompress(stream, 1, 1 << 20, "payload"))
        assert symbols[0] == 1
        if at == "flag":
            symbols[0] = 2
        elif at == "shift":
            symbols[1] = 17
        elif at == "turn":
            symbols[9] = 32
        elif at == "step":
            rest = np.float32(np.nan).tobytes() + rest[4:]
        elif at == "low bits":
            rest += b"\0"
        elif at == "not turned":
            symbols[0] = 0
        elif at == "raw":
            frame.raw_bytes += 1
        stream = zstd.compress_symbols(bytes(symbols))
        if at == "no stream":
            stream, rest = b"", rest
        payloads[0] = len(stream).to_bytes(4, "little") + stream + rest
        if at == "length":
            payloads[0] = b"\xff" * 4 + payloads[0][4:]

    return change


@pytest.mark.parametrize(
    ("at", "code"),
    [
        ("flag", "values"),
        ("shift", "values"),
        ("turn", "values"),
        ("step", "values"),
        ("low bits", "counts"),
        ("not turned", "counts"),
        ("raw", "counts"),
        ("length", "counts"),
        ("no stream", "payload"),
    ],
)
def test_frames_that_cannot_be_are_refused(
    at: str, code: str, meta: UpdateMeta, forge: Forge
) -> None:
    x = {"a": _moving_together()["a"]}
    blob = encode_update(x, meta, CodecConfig(name="axes")).blob
    with pytest.raises(WireError) as caught:
        decode_update(forge(blob, _spoil(at)), {"a": (8, 384)})
    assert caught.value.code == code


def test_a_turn_may_be_any_matrix_and_stays_finite() -> None:
    """What passes the checks is finite, however little it is a rotation."""
    levels_rn = np.full((64, 70), (1 << 23) - 1, np.int32)
    turn_rr = np.full((64, 64), 31, np.int8)
    form = Axes(levels_rn, turn_rr, 3e29, torch.Size([64, 70]))
    assert bool(torch.isfinite(form.dense()).all())
