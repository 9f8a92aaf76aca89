"""Ternary updates as they are admitted: run bytes stand for the positions that were packed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.vectors.sparse import SparseTernary, ternarise
from anabranch.wire import (
    CodecConfig,
    UpdateMeta,
    WireError,
    decode_forms,
    encode_update,
    read_manifest,
)
from anabranch.wire.codecs import support
from anabranch.wire.codecs.ternary import TERNARY
from anabranch.wire.codecs.ternary_runs import TernaryRuns
from anabranch.wire.manifest import FrameInfo, TensorInfo
from anabranch.wire.v1 import update_pb2 as pb

Forge = Callable[..., bytes]


def _frame(forms: list[SparseTernary], number: int) -> tuple[FrameInfo, bytes] | None:
    packing = next(one for one in TERNARY.packings if one.number == number)
    packed = packing.pack(forms)
    if packed is None:
        return None
    rows = tuple(
        TensorInfo(f"t{row}", tuple(form.shape), form.nonzeros, form.scale)
        for row, form in enumerate(forms)
    )
    return FrameInfo(number, rows, packed.raw_bytes, len(packed.payload), b""), packed.payload


@given(
    st.lists(
        st.tuples(st.integers(1, 1200), st.sampled_from([0, 1, 2, 0.05, 0.5, 1.0])),
        min_size=1,
        max_size=7,
    ),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_runs_say_what_positions_said(rows: list[tuple[int, float]], seed: int) -> None:
    """Also with tensors of zeros, single non-zeros, and runs beyond 255 that cross tensors."""
    rng = np.random.default_rng(seed)
    forms = []
    for entries, kept in rows:
        x = rng.standard_normal(entries)
        count = int(kept) if kept in (0, 1, 2) and entries > 2 else round(kept * entries)
        x[rng.permutation(entries)[: entries - min(count, entries)]] = 0
        forms.append(ternarise(torch.from_numpy(x), 1.0))
    for packing in TERNARY.packings:
        written = _frame(forms, packing.number)
        if written is None:
            continue
        frame, payload = written
        found = packing.unpack(memoryview(payload), frame, len)
        for form, runs in zip(forms, found, strict=True):
            assert isinstance(runs, TernaryRuns)
            assert torch.equal(runs.sparse().positions_k, form.positions_k)
            assert torch.equal(runs.sparse().negative_k, form.negative_k)
            assert torch.equal(runs.dense(), form.dense())
            assert runs.norm() == form.norm()


def test_an_update_is_held_at_the_bytes_it_came_in(meta: UpdateMeta) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    blob = encode_update({"x": x}, meta, CodecConfig(density=0.1)).blob
    _, forms, _ = decode_forms(blob, {"x": (100_000,)}, {})
    (frame,) = read_manifest(blob).frames
    assert forms["x"].nbytes == frame.payload_bytes


@pytest.mark.parametrize("density", [0.002, 0.1])
@pytest.mark.parametrize("moved", [-1, 1])
def test_nonzeros_of_another_tensor_are_refused(
    density: float, moved: int, meta: UpdateMeta, forge: Forge, runs_only: None
) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {name: torch.randn(9000, generator=generator) for name in "abc"}
    blob = encode_update(tensors, meta, CodecConfig(density=density)).blob

    def claim(manifest: pb.Manifest, payloads: list[bytes]) -> None:
        (frame,) = manifest.frames
        frame.nonzeros[0] += moved
        frame.nonzeros[1] -= moved

    with pytest.raises(WireError, match="other tensors than announced") as caught:
        decode_forms(forge(blob, claim), dict.fromkeys(tensors, (9000,)), {})
    assert caught.value.code == "counts"


@pytest.mark.parametrize("density", [0.3, 0.004])
def test_run_bytes_and_positions_are_the_same_in_parts_as_in_one(
    monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    form = ternarise(x, density)

    def there_and_back() -> tuple[bytes, list[int]]:
        written = _frame([form], pb.CODEC_TERNARY)
        assert written is not None
        frame, payload = written
        [held] = TERNARY.packings[0].unpack(memoryview(payload), frame, len)
        assert isinstance(held, TernaryRuns)
        return payload, held.sparse().positions_k.tolist()

    whole = there_and_back()
    assert whole[1] == form.positions_k.tolist()
    for part in (1, 7, 64):
        monkeypatch.setattr(support, "_CHUNK", part)
        assert there_and_back() == whole
