"""Updates decoded into the memory of a device hold what they hold on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from anabranch.wire import CodecConfig, UpdateMeta, decode_into, decode_update, encode_update

CODECS = {
    "ternary": CodecConfig(density=0.1),
    "ternary, few": CodecConfig(density=0.002),
    "ternary, most": CodecConfig(density=0.7),
    "int8": CodecConfig(name="dense", dtype="int8"),
    "axes": CodecConfig(name="axes"),
}


@pytest.mark.parametrize("codec", CODECS)
def test_a_message_is_decoded_on_the_device(codec: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (8, 3000), "b": (3000, 8), "c": (300, 1000), "d": (), "e": (7,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["e"].zero_()
    meta = UpdateMeta("update", "ab" * 32, "cd" * 32, "f", "r", 1, "c", b"n" * 16, 1, 9)
    encoded = encode_update(tensors, meta, CODECS[codec])
    _, there = decode_update(encoded.blob, shapes, device=device)
    buffers = {name: torch.full(shape, 9.0, device=device) for name, shape in shapes.items()}
    assert decode_into(encoded.blob, buffers) == meta
    for name, sent in encoded.sent.items():
        assert there[name].device.type == device.type
        assert torch.equal(there[name].cpu(), sent)
        assert torch.equal(buffers[name].cpu(), sent)
