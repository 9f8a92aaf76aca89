"""Each way a message can be wrong, and the code it is refused with."""

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor

from anabranch.wire import (
    CodecConfig,
    Limits,
    UpdateMeta,
    WireError,
    decode_update,
    encode_update,
    read_manifest,
    zstd,
)
from anabranch.wire.v1 import update_pb2 as pb

Change = Callable[[pb.Manifest, list[bytes]], object]
Forge = Callable[[bytes, Change], bytes]
Layout = dict[str, tuple[int, ...]]


@pytest.fixture
def layout(small: dict[str, Tensor]) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in small.items()}


@pytest.fixture
def blob(small: dict[str, Tensor], meta: UpdateMeta, runs_only: None) -> bytes:
    return encode_update(small, meta, CodecConfig(density=0.1)).blob


def _refused(blob: bytes, layout: Layout) -> tuple[str, str]:
    with pytest.raises(WireError) as caught:
        decode_update(blob, layout)
    reason = str(caught.value)
    assert reason
    assert "\n" not in reason
    return caught.value.code, reason


def test_every_truncation_is_refused(blob: bytes, layout: Layout) -> None:
    codes = {_refused(blob[:length], layout)[0] for length in range(len(blob))}
    assert codes == {"truncated"}
    assert _refused(b"\xff" * 7, layout)[0] == "truncated"


def test_trailing_bytes_are_refused(blob: bytes, layout: Layout) -> None:
    assert _refused(blob + b"\0", layout)[0] == "trailing"
    assert _refused(blob + blob, layout)[0] == "trailing"


def test_a_message_beyond_any_of_this_layout_is_refused_unread(blob: bytes, layout: Layout) -> None:
    assert _refused(blob + bytes(20_000), layout)[0] == "too-large"


def test_a_header_length_beyond_the_cap_is_refused(blob: bytes, layout: Layout) -> None:
    code, reason = _refused(b"\xff" * 8 + blob[8:], layout)
    assert code == "too-large"
    assert str(2**64 - 1) in reason


def test_other_files_are_refused(blob: bytes, layout: Layout) -> None:
    assert _refused(blob[:8] + b"PK\x03\x04" + blob[12:], layout)[0] == "magic"
    safetensors = struct.pack("<Q", 16) + b'{"a":[1, 2, 3] }' + bytes(8)
    assert _refused(safetensors, layout)[0] == "magic"
    assert _refused(bytes(8), layout)[0] == "magic"


def test_a_manifest_that_is_no_protobuf_is_refused(
    forge: Forge, blob: bytes, layout: Layout
) -> None:
    header = b"ANBR" + zstd.compress_text(b"\xff\xff\xff")
    assert _refused(len(header).to_bytes(8, "little") + header, layout)[0] == "manifest"
    header = b"ANBR" + b"\x28\xb5\x2f\xfd"
    assert _refused(len(header).to_bytes(8, "little") + header, layout)[0] == "manifest"


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_other_versions_are_refused_by_name(
    forge: Forge, blob: bytes, layout: Layout, version: int
) -> None:
    other = forge(blob, lambda m, _: setattr(m, "format_version", version))
    code, reason = _refused(other, layout)
    assert code == "version"
    assert f"has format version {version}, this release reads 1" in reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", 0),
        ("kind", 9),
        ("base_hash", b""),
        ("base_hash", b"x" * 33),
        ("start_hash", b"x"),
        ("federation", "é" * 129),
        ("run", "r" * 257),
        ("client", "c" * 257),
        ("codec", "c" * 257),
        ("nonce", b"n" * 65),
        ("key_id", b"k" * 65),
        ("signature", b"s" * 65),
    ],
)
def test_impossible_metadata_is_refused(
    forge: Forge, blob: bytes, layout: Layout, field: str, value: object
) -> None:
    assert _refused(forge(blob, lambda m, _: setattr(m, field, value)), layout)[0] == "meta"


@pytest.mark.parametrize("number", [0, 2, 99])
def test_codecs_unknown_or_unannounced_are_refused(
    forge: Forge, blob: bytes, layout: Layout, number: int
) -> None:
    other = forge(blob, lambda m, _: setattr(m.frames[0], "codec", number))
    assert _refused(other, layout)[0] == "codec"
    other = forge(blob, lambda m, _: setattr(m, "codec", "\x1b[31mternary\n"))
    code, reason = _refused(other, layout)
    assert code == "codec"
    assert "\x1b" not in reason


def test_another_layout_is_refused(blob: bytes, layout: Layout) -> None:
    renamed = {name.replace("a.", "aa."): shape for name, shape in layout.items()}
    assert _refused(blob, renamed) == (
        "layout",
        "the message has other tensors than expected; they differ in ['a.weight', 'aa.weight']",
    )
    assert _refused(blob, {**layout, "e": (1,)})[0] == "layout"
    assert _refused(blob, {**layout, "a.weight": (50, 6)})[0] == "layout"
    assert _refused(blob, {**layout, "a.weight": (300,)})[0] == "layout"
    assert _refused(blob, {**layout, "a.weight": (1 << 19,)})[0] == "layout"
    assert _refused(blob, {"e": (4,)})[0] in {"layout", "too-large"}


def test_tensors_out_of_order_or_in_other_frames_are_refused(
    forge: Forge, blob: bytes, layout: Layout
) -> None:
    def swap(manifest: pb.Manifest, _: list[bytes]) -> None:
        names = manifest.frames[0].names
        names[0], names[1] = names[1], names[0]

    def twice(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        manifest.frames.append(manifest.frames[0])
        payloads.append(payloads[0])

    def none(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        del manifest.frames[:], payloads[:]

    for change in (swap, twice, none):
        assert _refused(forge(blob, change), layout)[0] == "layout"


@pytest.mark.parametrize("column", ["names", "ranks", "dims", "nonzeros", "scales", "digest"])
def test_columns_that_do_not_match_are_refused(
    forge: Forge, blob: bytes, layout: Layout, column: str
) -> None:
    def cut(manifest: pb.Manifest, _: list[bytes]) -> None:
        frame = manifest.frames[0]
        setattr(frame, column, frame.digest[:-1]) if column == "digest" else getattr(
            frame, column
        ).pop()

    assert _refused(forge(blob, cut), layout)[0] == "manifest"


def test_a_rank_beyond_the_cap_is_refused(forge: Forge, blob: bytes, layout: Layout) -> None:
    def deepen(manifest: pb.Manifest, _: list[bytes]) -> None:
        manifest.frames[0].ranks[0] = 9
        manifest.frames[0].dims[:0] = [1] * 7

    assert _refused(forge(blob, deepen), layout)[0] == "manifest"


def _set(column: str, row: int, value: float) -> Change:
    def change(manifest: pb.Manifest, _: list[bytes]) -> None:
        getattr(manifest.frames[0], column)[row] = value

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_set("nonzeros", 0, 29), "counts"),
        (_set("nonzeros", 0, 31), "counts"),
        (_set("nonzeros", 0, 2**63), "counts"),
        (_set("nonzeros", 2, 1), "values"),
        (_set("nonzeros", 1, 0), "values"),
        (_set("scales", 0, float("nan")), "values"),
        (_set("scales", 0, float("inf")), "values"),
        (_set("scales", 0, -1.0), "values"),
        (_set("scales", 0, 0.0), "values"),
        (_set("scales", 2, 1.0), "values"),
        (lambda m, _: setattr(m.frames[0], "entries", 1220), "counts"),
        (lambda m, _: setattr(m.frames[0], "raw_bytes", 40), "too-large"),
        (lambda m, _: setattr(m.frames[0], "raw_bytes", 42), "payload"),
        (lambda m, _: setattr(m.frames[0], "raw_bytes", 2**60), "counts"),
        (lambda m, _: setattr(m.frames[0], "raw_bytes", 0), "counts"),
        (lambda m, _: setattr(m.frames[0], "digest", bytes(16)), "digest"),
        (lambda m, _: m.frames[0].ClearField("nonzeros"), "manifest"),
    ],
)
def test_counts_and_scales_that_do_not_fit_are_refused(
    forge: Forge, blob: bytes, layout: Layout, change: Change, code: str
) -> None:
    assert _refused(forge(blob, change), layout)[0] == code


def test_a_sparse_frame_without_its_columns_is_refused(
    forge: Forge, blob: bytes, layout: Layout
) -> None:
    def strip(manifest: pb.Manifest, _: list[bytes]) -> None:
        del manifest.frames[0].nonzeros[:], manifest.frames[0].scales[:]

    assert _refused(forge(blob, strip), layout)[0] == "counts"


def test_non_zeros_moved_to_another_tensor_are_refused(
    forge: Forge, blob: bytes, layout: Layout
) -> None:
    def move(manifest: pb.Manifest, _: list[bytes]) -> None:
        manifest.frames[0].nonzeros[:] = [29, 3, 0, 1]

    assert _refused(forge(blob, move), layout) == (
        "counts",
        "the frame of a.weight: non-zeros lie in other tensors than announced",
    )


SIGNS = 5


def _with_runs(edit: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Rewrites the run bytes of the only frame."""

    def change(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        signs = payloads[0][-SIGNS:]
        size = manifest.frames[0].raw_bytes - SIGNS
        raw = zstd.decompress(payloads[0][:-SIGNS], size, size, "payload")
        runs = edit(np.frombuffer(raw, np.uint8).copy())
        manifest.frames[0].raw_bytes = runs.size + SIGNS
        payloads[0] = zstd.compress_symbols(runs.tobytes()) + signs

    return change


def _last_run_longer(runs: np.ndarray) -> np.ndarray:
    runs[-1] += 1
    return runs


def _last_run_is_an_escape(runs: np.ndarray) -> np.ndarray:
    runs[-1] = 255
    return runs


def _first_run_is_an_escape(runs: np.ndarray) -> np.ndarray:
    runs[0] = 255
    return runs


def _swap_an_escape_with_the_end(runs: np.ndarray) -> np.ndarray:
    escape = int(np.flatnonzero(runs == 255)[0])
    runs[escape], runs[-1] = runs[-1], runs[escape]
    return runs


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_last_run_longer, "position 1221 is beyond the frame's 1221 entries"),
        (_first_run_is_an_escape, "the runs end 32 non-zeros, not 33"),
        (_last_run_is_an_escape, "the runs end 32 non-zeros, not 33"),
        (_swap_an_escape_with_the_end, "the runs end 33 non-zeros, not 33"),
        (lambda runs: runs[:-1], "the runs end 32 non-zeros, not 33"),
    ],
)
def test_runs_that_do_not_place_the_non_zeros_are_refused(
    forge: Forge,
    blob: bytes,
    layout: Layout,
    edit: Callable[[np.ndarray], np.ndarray],
    reason: str,
) -> None:
    code, text = _refused(forge(blob, _with_runs(edit)), layout)
    assert code == "counts"
    assert reason in text


def test_payload_bytes_out_of_place_are_refused(forge: Forge, blob: bytes, layout: Layout) -> None:
    def replace(new: Callable[[bytes], bytes]) -> Change:
        return lambda _, payloads: payloads.__setitem__(0, new(payloads[0]))

    for new in (
        lambda old: old[:-SIGNS] + b"\0" + old[-SIGNS:],
        lambda old: old[-SIGNS:],
        lambda old: old[-SIGNS + 1 :],
        lambda old: b"",
        lambda old: old[:-1] + bytes([old[-1] | 0x80]),
        lambda old: bytes(4) + old[4:],
        lambda old: b"\x50\x2a\x4d\x18\4\0\0\0abcd" + old,
    ):
        assert _refused(forge(blob, replace(new)), layout)[0] == "payload"


def test_bytes_beside_no_non_zeros_are_refused(meta: UpdateMeta, forge: Forge) -> None:
    empty = encode_update({"x": torch.zeros(9)}, meta, CodecConfig()).blob
    other = forge(empty, lambda _, payloads: payloads.__setitem__(0, b"x"))
    assert _refused(other, {"x": (9,)})[0] == "payload"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_dense_payloads_of_the_wrong_length_are_refused(
    small: dict[str, Tensor], meta: UpdateMeta, layout: Layout, forge: Forge, dtype: str
) -> None:
    blob = encode_update(small, meta, CodecConfig(name="dense", dtype=dtype)).blob

    def shorten(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        payloads[0] = payloads[0][:-1]
        manifest.frames[0].raw_bytes = len(payloads[0])

    def sparse(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        manifest.frames[0].nonzeros[:] = [1] * 4
        manifest.frames[0].scales[:] = [1.0] * 4

    def lie(manifest: pb.Manifest, _: list[bytes]) -> None:
        manifest.frames[0].raw_bytes = 7

    for change in (shorten, sparse, lie):
        assert _refused(forge(blob, change), layout)[0] == "counts"


@pytest.mark.parametrize(
    ("dtype", "offset", "value"),
    [
        ("fp32", 4, struct.pack("<f", float("nan"))),
        ("fp32", 0, struct.pack("<f", float("-inf"))),
        ("bf16", 2, b"\x80\x7f"),
        ("int8", 0, struct.pack("<f", float("nan"))),
        ("int8", 0, struct.pack("<f", -1.0)),
        ("int8", 0, struct.pack("<f", 3e38)),
        ("int8", -1, b"\x80"),
    ],
)
def test_dense_values_that_are_not_finite_are_refused(
    small: dict[str, Tensor],
    meta: UpdateMeta,
    layout: Layout,
    forge: Forge,
    dtype: str,
    offset: int,
    value: bytes,
) -> None:
    blob = encode_update(small, meta, CodecConfig(name="dense", dtype=dtype)).blob

    def poison(_: pb.Manifest, payloads: list[bytes]) -> None:
        at = offset % len(payloads[0])
        payloads[0] = payloads[0][:at] + value + payloads[0][at + len(value) :]

    assert _refused(forge(blob, poison), layout)[0] == "values"


BOMB_BYTES = 32 << 20


def _bomb(declare: bool) -> bytes:
    """One KB that decompresses to 32 MB of zeros."""
    writer = zstandard.ZstdCompressor(level=1, write_content_size=declare).compressobj(
        size=BOMB_BYTES if declare else -1
    )
    return writer.compress(bytes(BOMB_BYTES)) + writer.flush()


def _lying_bomb(declared: int) -> bytes:
    """The bomb's blocks behind a header that declares little."""
    honest = _bomb(True)
    blocks = honest[zstandard.frame_header_size(honest) :]
    # The magic number; a size of four bytes follows, and no window; the size.
    return b"\x28\xb5\x2f\xfd" + bytes([0b1010_0000]) + declared.to_bytes(4, "little") + blocks


@pytest.mark.parametrize("place", ["payload", "manifest"])
@pytest.mark.parametrize("kind", ["honest", "silent", "lying"])
def test_bombs_are_refused_before_they_take_memory(
    runs_only: None, forge: Forge, meta: UpdateMeta, place: str, kind: str
) -> None:
    blob = encode_update({"x": torch.randn(1 << 16)}, meta, CodecConfig(density=0.1)).blob
    frame = read_manifest(blob).frames[0]
    sign_bytes = -(-6554 // 8)
    bomb = {
        "honest": lambda: _bomb(True),
        "silent": lambda: _bomb(False),
        "lying": lambda: _lying_bomb(frame.raw_bytes - sign_bytes if place == "payload" else 900),
    }[kind]()
    assert len(bomb) < 1200
    if place == "payload":
        message = forge(blob, lambda _, p: p.__setitem__(0, bomb + p[0][-sign_bytes:]))
    else:
        header = b"ANBR" + bomb
        message = len(header).to_bytes(8, "little") + header
    tracemalloc.start()
    try:
        code, reason = _refused(message, {"x": (1 << 16,)})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert code == ("too-large" if kind == "honest" else place)
    assert ("does not declare its size" in reason) == (kind == "silent")
    assert peak_bytes < 1 << 20


def test_a_payload_bomb_that_the_manifest_announces_is_refused(
    forge: Forge, blob: bytes, layout: Layout
) -> None:
    def announce(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        manifest.frames[0].raw_bytes = BOMB_BYTES + SIGNS
        payloads[0] = _bomb(True) + payloads[0][-SIGNS:]

    assert _refused(forge(blob, announce), layout)[0] == "counts"


def test_a_window_beyond_the_bound_is_refused() -> None:
    # Not a single segment: a window of 128 MB for 16 bytes of output, cut so that libzstd has to
    # make room for the window.
    frame = b"\x28\xb5\x2f\xfd" + bytes([0b1000_0000, 0b1000_1000]) + (16).to_bytes(4, "little")
    with pytest.raises(WireError, match="damaged"):
        zstd.decompress(frame + b"\x01\x00\x00", 1, 16, "payload")


def test_a_caller_may_tighten_the_caps(blob: bytes) -> None:
    for limits in (Limits(manifest_bytes=100), Limits(message_bytes=len(blob) - 1)):
        with pytest.raises(WireError) as caught:
            read_manifest(blob, limits)
        assert caught.value.code == "too-large"
