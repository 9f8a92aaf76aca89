import math
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.vectors import weights_hash
from anabranch.vectors.sparse import ternarise
from anabranch.wire import (
    CodecConfig,
    UpdateMeta,
    WireError,
    decode_forms,
    decode_into,
    decode_update,
    encode_update,
    read_manifest,
)
from anabranch.wire.codecs.ternary_runs import TernaryRuns
from anabranch.wire.frames import FRAME_ENTRIES, plan_frames

GOLDEN = Path(__file__).parent / "golden"

CODECS = [
    CodecConfig(density=0.1),
    CodecConfig(density=1.0),
    CodecConfig(name="dense", dtype="fp32"),
    CodecConfig(name="dense", dtype="bf16"),
    CodecConfig(name="dense", dtype="fp16"),
    CodecConfig(name="dense", dtype="int8"),
    CodecConfig(name="axes"),
]


def _codec_id(codec: CodecConfig) -> str:
    own = {"ternary": f"ternary-{codec.density}", "dense": codec.dtype}
    return own.get(codec.name, codec.name)


def _layout(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_round_trip(
    tensors: dict[str, Tensor], meta: UpdateMeta, codec: CodecConfig
) -> dict[str, Tensor]:
    encoded = encode_update(tensors, meta, codec)
    got, decoded = decode_update(encoded.blob, _layout(tensors))
    assert got == meta
    assert list(decoded) == sorted(tensors)
    for name, tensor in decoded.items():
        sent = encoded.sent[name]
        assert tensor.dtype == sent.dtype == torch.float32
        assert tensor.shape == tensors[name].shape
        # Bits, not values: -0.0 is not 0.0 here.
        assert torch.equal(tensor.view(torch.int32), sent.view(torch.int32))
    return decoded


@pytest.mark.parametrize("codec", CODECS, ids=_codec_id)
def test_the_receiver_decodes_what_the_sender_says_it_sent(
    small: dict[str, Tensor], meta: UpdateMeta, codec: CodecConfig
) -> None:
    _check_round_trip(small, meta, codec)


def test_each_codec_loses_what_it_says_and_no_more(
    demo: dict[str, Tensor], meta: UpdateMeta
) -> None:
    exact = _check_round_trip(demo, meta, CodecConfig(name="dense", dtype="fp32"))
    half = _check_round_trip(demo, meta, CodecConfig(name="dense", dtype="bf16"))
    byte = _check_round_trip(demo, meta, CodecConfig(name="dense", dtype="int8"))
    ternary = _check_round_trip(demo, meta, CodecConfig(density=0.2))
    for name, tensor in demo.items():
        assert torch.equal(exact[name], tensor)
        assert torch.equal(half[name], tensor.bfloat16().float())
        assert (byte[name] - tensor).abs().max() <= tensor.abs().max() / 253
        assert torch.equal(ternary[name], ternarise(tensor, 0.2).dense())


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_round_trips_of_any_shapes(data: st.DataObject) -> None:
    meta = UpdateMeta("adapter", "0" * 64, "", "", "", 0, "", b"", None, 0)
    tensors = {}
    for index in range(data.draw(st.integers(1, 4))):
        shape = tuple(data.draw(st.lists(st.integers(0, 40), max_size=3)))
        seed = data.draw(st.integers(0, 2**32))
        generator = torch.Generator().manual_seed(seed)
        filled = data.draw(st.sampled_from([0.0, 0.003, 0.1, 1.0]))
        mask = torch.rand(shape, generator=generator) < filled
        tensors[f"t{index}"] = torch.randn(shape, generator=generator).where(mask, 0.0)
    density = data.draw(st.sampled_from([1e-6, 0.002, 0.1, 0.5, 1.0]))
    dense = data.draw(st.sampled_from(CODECS[2:]))
    for codec in (CodecConfig(density=density), dense):
        _check_round_trip(tensors, meta, codec)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 100_000])
def test_runs_of_zeros_of_any_length(gap: int, meta: UpdateMeta) -> None:
    x = torch.zeros(gap + 2)
    x[0], x[gap + 1] = -2.0, 2.0
    late = torch.zeros(gap + 1)
    late[gap] = 2.0
    for tensor in (x, late):
        decoded = _check_round_trip({"x": tensor, "y": x}, meta, CodecConfig(density=1.0))
        assert torch.equal(decoded["x"], tensor)


def test_frames_hold_whole_tensors_and_are_large(meta: UpdateMeta) -> None:
    tensors = {f"m{index}": torch.randn(600, 600) for index in range(7)}
    frames = read_manifest(encode_update(tensors, meta, CodecConfig()).blob).frames
    assert [[row.name for row in frame.tensors] for frame in frames] == [
        ["m0", "m1", "m2"],
        ["m3", "m4", "m5"],
        ["m6"],
    ]
    _check_round_trip(tensors, meta, CodecConfig(density=0.03))
    assert plan_frames({"b": (FRAME_ENTRIES,), "a": (1,), "c": (1,)}) == [["a", "b"], ["c"]]


def test_a_sparse_update_stays_sparse_when_asked(
    small: dict[str, Tensor], meta: UpdateMeta
) -> None:
    blob = encode_update(small, meta, CodecConfig(density=0.1)).blob
    _, forms, _ = decode_forms(blob, _layout(small), {})
    for name, form in forms.items():
        expected = ternarise(small[name], 0.1)
        assert isinstance(form, TernaryRuns)
        assert torch.equal(form.sparse().positions_k, expected.positions_k)
        assert torch.equal(form.sparse().negative_k, expected.negative_k)
        assert form.scale == expected.scale


@pytest.mark.parametrize("tail", ["gaussian", "laplace"])
def test_the_demo_update_is_22_times_smaller_than_fp16(
    demo: dict[str, Tensor], meta: UpdateMeta, tail: str
) -> None:
    if tail == "laplace":
        generator = torch.Generator().manual_seed(1)
        for tensor in demo.values():
            tensor *= torch.empty_like(tensor).exponential_(generator=generator).sqrt()
    fp16_bytes = 2 * sum(tensor.numel() for tensor in demo.values())
    assert fp16_bytes == 147_456
    blob = encode_update(demo, meta, CodecConfig(density=0.1)).blob
    manifest = read_manifest(blob)
    payload_bytes = sum(frame.payload_bytes for frame in manifest.frames)
    assert payload_bytes <= fp16_bytes / 27
    assert manifest.payload_start <= 512
    assert len(blob) <= fp16_bytes / 22


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
def test_a_million_entries_are_within_one_and_a_half_percent_of_entropy(
    density: float, meta: UpdateMeta
) -> None:
    entries = 1 << 20
    x = torch.randn(entries, generator=torch.Generator().manual_seed(2))
    blob = encode_update({"x": x}, meta, CodecConfig(density=density)).blob
    bits = -density * math.log2(density) - (1 - density) * math.log2(1 - density) + density
    payload_bytes = len(blob) - read_manifest(blob).payload_start
    assert payload_bytes * 8 <= bits * entries * 1.015


def test_the_manifest_says_what_the_message_holds(
    small: dict[str, Tensor], meta: UpdateMeta
) -> None:
    manifest = read_manifest(encode_update(small, meta, CodecConfig(density=0.1)).blob)
    assert manifest.meta == meta
    assert manifest.codec == "ternary"
    assert (manifest.key_id, manifest.signature) == (b"", b"")
    (frame,) = manifest.frames
    assert [row.name for row in frame.tensors] == list(small)
    assert [row.shape for row in frame.tensors] == [(6, 50), (900,), (4, 5), ()]
    assert [row.nonzeros for row in frame.tensors] == [30, 2, 0, 1]
    assert [row.scale for row in frame.tensors][1:] == [2.0, 0.0, 0.5]
    # 33 runs, three escapes in the gap of 898 zeros, five bytes of signs.
    assert (frame.entries, frame.raw_bytes) == (1221, 33 + 3 + 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", CODECS, ids=_codec_id)
def test_a_diverged_tensor_is_named(bad: float, codec: CodecConfig, meta: UpdateMeta) -> None:
    with pytest.raises(ValueError, match=r"head\.bias: the tensor holds"):
        encode_update({"head.bias": torch.tensor([0.0, bad])}, meta, codec)


def test_what_cannot_be_encoded_is_refused(meta: UpdateMeta) -> None:
    with pytest.raises(ValueError, match="give at least one"):
        encode_update({}, meta, CodecConfig())
    with pytest.raises(ValueError, match="9 dimensions, beyond 8"):
        encode_update({"x": torch.zeros([1] * 9)}, meta, CodecConfig())
    top = torch.tensor([torch.finfo(torch.float32).max])
    with pytest.raises(ValueError, match=r"beyond torch\.bfloat16"):
        encode_update({"x": top}, meta, CodecConfig(name="dense", dtype="bf16"))


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("kind", "patch", "give one of update, adapter"),
        ("base_hash", "", "give the 64 lower-case hexadecimal digits"),
        ("base_hash", "AB" * 32, "give the 64 lower-case hexadecimal digits"),
        ("start_hash", "abc", "give the 64 lower-case hexadecimal digits"),
        ("client", "x" * 257, "longer than 256 bytes"),
        ("nonce", b"n" * 65, "give at most 64"),
        ("round", -1, r"give a number of 0 to 2\^32 - 1"),
        ("seed", 1 << 64, r"give a number of 0 to 2\^64 - 1"),
        ("examples", -5, "examples is -5"),
    ],
)
def test_impossible_metadata_is_refused(
    meta: UpdateMeta, field: str, value: object, fix: str
) -> None:
    with pytest.raises(ValueError, match=fix):
        UpdateMeta(**{**vars(meta), field: value})


GOLDEN_HASHES = {
    "ternary-0.1": "c59fc2ba454d0be1b3a6f3f2c0e07c78c0de971d93a7e252b7a8d501ecb5c9df",
    "ternary-1.0": "c1724c0ddb22b9128e6bfc901ecd34879aa4813791a81da788f13dadd008e6c6",
    "fp32": "de94892c945df6b50e05afc6b62d3172fc3d7792244f62945d9b24a9d298ab4a",
    "bf16": "ccbc2ff6d7ab6407de4f2824e732ce633a5f5b7000bf9a9f42fbd650121398c2",
    "int8": "4735f397466db3205f31b19cdc0e80508484033538ce18e70a56bab5fdc0c361",
    "ternary-draws": "6afa3acbecdc229340f403b391d4601e983be5c17163cff37766f98cf3b844b5",
    "ternary-mask": "a48de97a5a2139d9bcc04fccf9ed12562a22cde62d8d928ca07bc7963928d242",
    "two-bit": "fe3af0f5dd1db00522be788cd76ee0aa95eb9450a0e7e5083a0abad1b6a30d57",
    "two-bit-mask": "a1fbd2463ee8738d260fbf19a5de6baac687bfc31d04fded49ba03cc44a5b733",
    "int4": "f084573912de08dcfd3c0f51b9bc89fc837f1ea9a1323aadcc78703f059f534e",
    "fp16": "de94892c945df6b50e05afc6b62d3172fc3d7792244f62945d9b24a9d298ab4a",
    "sign": "5f31180f162a5a5b3ba2358295ee0ebef6e8fcb829c5eff313afa1854729f311",
    "rotated-1": "e1a5c878f0be5a6a584214a400a74809d429cb14bb7545c7e3605c692dbeba8d",
    "rotated-3": "42c2a1e682672b8a3adb43c387367ddeaa4aff41b095d8b458e847ac2c2d7524",
    "rotated-6": "4de3faf517102b2feef8a9663bd8fd8627ca4d885fd2a57a37c323445e4dc05b",
    "dare": "51179874e99e7464c2697154a4311cf0eb3d62edee645afeff593f3090f9ee28",
    "fp32-coded": "5ec756001c89daecef2187d0780e4d777962ff551a27a2b2c1daf974e0d3c72a",
    "ranks": "1963e07bc592c87500a1dbe6528d7a9c82b390bfa5d372d48253553e79dc5884",
    "axes": "f6b0f141dc433430af01c475a03aaee9e1240d4b1493f86f8f92e627e6de05b3",
    "int8-coded": "1a940bf76a59a854b2d3a38422d3587a48a49778d9efe7de1873b7d62348c020",
}


def golden_tensors() -> dict[str, Tensor]:
    """What the golden messages were made of: values by arithmetic alone."""
    values = ((torch.arange(300) * 7919) % 2003 - 1001).float() / 1024
    gap = torch.zeros(600)
    gap[599] = 0.25
    return {
        "head.bias": values[:7],
        "layer.lora_A": values[7:247].reshape(4, 60),
        "layer.lora_B": gap.reshape(150, 4),
    }


@pytest.mark.parametrize("name", GOLDEN_HASHES)
def test_messages_of_version_1_are_decoded_for_ever(name: str, meta: UpdateMeta) -> None:
    blob = (GOLDEN / f"v1-{name}.bin").read_bytes()
    layout = _layout(golden_tensors())
    if name.endswith(("-mask", "-coded")):
        layout["wide"] = (12_000,)
    got, decoded = decode_update(blob, layout)
    assert got == meta
    assert weights_hash(decoded) == GOLDEN_HASHES[name]
    if name == "fp32":
        assert weights_hash(golden_tensors()) == GOLDEN_HASHES[name]


@pytest.mark.parametrize("codec", CODECS, ids=_codec_id)
def test_a_message_is_decoded_into_tensors_that_are_there(
    codec: CodecConfig, small: dict[str, Tensor], meta: UpdateMeta
) -> None:
    encoded = encode_update(small, meta, codec)
    there = {name: torch.full_like(tensor, 9) for name, tensor in small.items()}
    # A tensor that is no row of memory, and one of fewer bits.
    there["a.weight"] = torch.full((50, 6), 9.0).T
    there["b.gap"] = there["b.gap"].double()
    assert decode_into(encoded.blob, there) == meta
    for name, sent in encoded.sent.items():
        assert torch.equal(there[name].float(), sent)
    with pytest.raises(WireError, match="expected"):
        decode_into(encoded.blob, {**there, "a.weight": torch.zeros(6, 51)})


@pytest.mark.parametrize("name", ["int8", "ternary"])
def test_decoding_into_tensors_holds_a_frame_of_them_beside(name: str, meta: UpdateMeta) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"m{n:02}": torch.randn(1024, 1024, generator=generator) for n in range(16)}
    codec = CodecConfig(name="dense", dtype="int8") if name == "int8" else CodecConfig(density=0.1)
    encoded = encode_update(tensors, meta, codec)
    there = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    threads = torch.get_num_threads()
    decode_into(encoded.blob, there)
    tracemalloc.start()
    decode_into(encoded.blob, there)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # numpy's memory is traced. A frame is 4 MiB of the 64, and some of its forms.
    assert peak < threads * 12 << 20
    assert all(torch.equal(there[name], sent) for name, sent in encoded.sent.items())
