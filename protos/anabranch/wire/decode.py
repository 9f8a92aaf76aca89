"""Update messages from strangers: bytes back to tensors.

Decoding is bounded by the names and shapes of the local configuration before anything is
decompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from anabranch.wire.codecs.codec import Form
from anabranch.wire.codecs.registry import packing_numbered
from anabranch.wire.codecs.ternary_runs import TernaryRuns
from anabranch.wire.errors import WireError
from anabranch.wire.frames import plan_frames
from anabranch.wire.header import read_manifest
from anabranch.wire.importance import IMPORTANCE, squares
from anabranch.wire.limits import limits_for
from anabranch.wire.manifest import FrameInfo, Manifest, UpdateMeta, payload_digest
from anabranch.wire.seeds import seed_of

Check = Callable[[Manifest], None]
"""Raises a WireError for a message whose manifest is not to be believed."""

Done = TypeVar("Done")

_SIDE_BY_SIDE = 1 << 20
"""Entries of a message from which its frames are decoded by several threads."""


def decode_update(
    blob: bytes | memoryview,
    layout: Mapping[str, tuple[int, ...]],
    check: Check | None = None,
    device: torch.device | str = "cpu",
) -> tuple[UpdateMeta, dict[str, Tensor]]:
    """Decode a message into dense tensors.

    Args:
        blob: The message, as it came.
        layout: Names and shapes expected, from the local configuration.
        check: Called with the manifest before any payload is touched (``wire.signing``).
        device: Where the tensors are wanted. On another device than the CPU they are allocated
            before anything is decompressed.

    Returns:
        What the message says of itself, and fp32 tensors by name, in sorted order.

    Raises:
        WireError: The message is not a sound one of exactly this layout; ``code`` says why.
    """
    if torch.device(device).type == "cpu":
        meta, forms, _ = decode_forms(blob, layout, {}, check)
        return meta, {name: form.dense() for name, form in forms.items()}
    tensors = {name: torch.empty(layout[name], device=device) for name in sorted(layout)}
    return decode_into(blob, tensors, check), tensors


def decode_into(
    blob: bytes | memoryview, tensors: Mapping[str, Tensor], check: Check | None = None
) -> UpdateMeta:
    """Decode a message frame by frame into tensors that are there, on any device.

    What the host holds beside them is one frame for each thread that decodes. Ternary frames reach
    the device as run bytes and signs, about a byte a non-zero, and become positions there.

    Args:
        blob: The message, as it came.
        tensors: Floating-point tensors by name, which give the layout that is expected. They are
            written over; after a refusal they hold whatever was decoded until then.
        check: Called with the manifest before any payload is touched (``wire.signing``).

    Returns:
        What the message says of itself.

    Raises:
        WireError: The message is not a sound one of exactly this layout; ``code`` says why.
    """
    layout = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    manifest, cut = _sound(blob, layout, {}, check)

    def place(frame: FrameInfo, payload: memoryview, announced: str) -> None:
        for name, form in _unpack_frame(manifest.meta, frame, payload, announced):
            if isinstance(form, TernaryRuns) and tensors[name].is_contiguous():
                form.write(tensors[name].view(-1))
            else:
                tensors[name].copy_(form.dense())

    for _ in _map(place, manifest.frames, cut, [manifest.codec] * len(cut)):
        pass
    return manifest.meta


def decode_forms(
    blob: bytes | memoryview,
    layout: Mapping[str, tuple[int, ...]],
    importance: Mapping[str, tuple[int, ...]],
    check: Check | None = None,
) -> tuple[UpdateMeta, dict[str, Form], dict[str, Tensor]]:
    """``decode_update``, leaving each tensor in its codec's form: sparse ones stay sparse.

    Args:
        blob: The message, as it came.
        layout: Names and shapes expected, from the local configuration.
        importance: The same of the importance that the message must hold, and none if empty.
        check: Called with the manifest before any payload is touched (``wire.signing``).

    Returns:
        What the message says of itself, the tensors' forms, and their importance in the flat layout
        of ``vectors.importance``: finite, zero or more.
    """
    manifest, cut = _sound(blob, layout, importance, check)
    frames = [*manifest.frames, *manifest.importance]
    names = [manifest.codec] * len(manifest.frames) + [IMPORTANCE.name] * len(manifest.importance)
    unpacked = list(_map(partial(_unpack_frame, manifest.meta), frames, cut, names))
    forms = dict(chain.from_iterable(unpacked[: len(manifest.frames)]))
    roots = dict(chain.from_iterable(unpacked[len(manifest.frames) :]))
    return manifest.meta, forms, squares(roots)


def _sound(
    blob: bytes | memoryview,
    layout: Mapping[str, tuple[int, ...]],
    importance: Mapping[str, tuple[int, ...]],
    check: Check | None,
) -> tuple[Manifest, list[memoryview]]:
    """The manifest of a message of exactly this layout, and the payload of each frame."""
    manifest = read_manifest(blob, limits_for(layout, importance))
    if check is not None:
        check(manifest)
    if bool(manifest.importance) != bool(importance):
        asked = "not asked for" if manifest.importance else "missing"
        raise WireError("importance", f"the importance of the update is {asked}")
    _check_layout(manifest.frames, layout)
    _check_layout(manifest.importance, importance)
    frames = [*manifest.frames, *manifest.importance]
    ends = list(accumulate(frame.payload_bytes for frame in frames))
    payloads = memoryview(blob)[manifest.payload_start :]
    cut = [
        payloads[end - frame.payload_bytes : end] for frame, end in zip(frames, ends, strict=True)
    ]
    return manifest, cut


def _map(work: Callable[..., Done], *columns: Sequence[Any]) -> Iterator[Done]:
    """``map``, over threads where there is enough to do; the first frame's error is raised."""
    threads = torch.get_num_threads()
    if threads == 1 or sum(frame.entries for frame in columns[0]) < _SIDE_BY_SIDE:
        return map(work, *columns)
    with ThreadPoolExecutor(threads) as pool:
        return iter(list(pool.map(work, *columns)))


def _unpack_frame(
    meta: UpdateMeta, frame: FrameInfo, payload: memoryview, announced: str
) -> list[tuple[str, Form]]:
    codec, packing = packing_numbered(frame.codec)
    if codec.name != announced:
        raise WireError("codec", f"a frame is {codec.name}, the manifest announces {announced!r}")
    if payload_digest(payload) != frame.digest:
        raise WireError("digest", f"the payload of {_label(frame)} does not match its digest")
    names = [row.name for row in frame.tensors]
    try:
        forms = packing.unpack(payload, frame, partial(seed_of, meta))
    except WireError as error:
        raise WireError(error.code, f"{_label(frame)}: {error}") from None
    return list(zip(names, forms, strict=True))


def _check_layout(frames: Sequence[FrameInfo], layout: Mapping[str, tuple[int, ...]]) -> None:
    """Names, shapes and frames must be exactly those the layout gives."""
    plan = plan_frames(layout)
    if len(plan) != len(frames):
        raise WireError("layout", f"the message has {len(frames)} frames, expected {len(plan)}")
    for names, frame in zip(plan, frames, strict=True):
        if names != [row.name for row in frame.tensors]:
            odd = sorted(set(names) ^ {row.name for row in frame.tensors})[:3]
            raise WireError(
                "layout", f"the message has other tensors than expected; they differ in {odd}"
            )
        for row in frame.tensors:
            if row.shape != tuple(layout[row.name]):
                raise WireError(
                    "layout",
                    f"{row.name} has shape {row.shape}, expected {tuple(layout[row.name])}",
                )


def _label(frame: FrameInfo) -> str:
    return f"the frame of {frame.tensors[0].name}"
