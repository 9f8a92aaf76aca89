"""Update messages from strangers: bytes back to tensors.

Decoding is bounded by the names and shapes of the local configuration before anything is
decompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from anabranch.wire.codecs.codec import Form
from anabranch.wire.codecs.registry import packing_numbered
from anabranch.wire.errors import WireError
from anabranch.wire.frames import plan_frames
from anabranch.wire.header import read_manifest
from anabranch.wire.importance import IMPORTANCE, squares
from anabranch.wire.limits import limits_for
from anabranch.wire.manifest import FrameInfo, Manifest, UpdateMeta, payload_digest
from anabranch.wire.seeds import seed_of

Check = Callable[[Manifest], None]
"""Raises a WireError for a message whose manifest is not to be believed."""

_SIDE_BY_SIDE = 1 << 20
"""Entries of a message from which its frames are decoded by several threads."""


def decode_update(
    blob: bytes | memoryview, layout: Mapping[str, tuple[int, ...]], check: Check | None = None
) -> tuple[UpdateMeta, dict[str, Tensor]]:
    """Decode a message into dense tensors.

    Args:
        blob: The message, as it came.
        layout: Names and shapes expected, from the local configuration.
        check: Called with the manifest before any payload is touched (``wire.signing``).

    Returns:
        What the message says of itself, and fp32 tensors by name, in sorted order.

    Raises:
        WireError: The message is not a sound one of exactly this layout; ``code`` says why.
    """
    meta, forms, _ = decode_forms(blob, layout, {}, check)
    return meta, {name: form.dense() for name, form in forms.items()}


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
    manifest = read_manifest(blob, limits_for(layout, importance))
    if check is not None:
        check(manifest)
    if bool(manifest.importance) != bool(importance):
        asked = "not asked for" if manifest.importance else "missing"
        raise WireError("importance", f"the importance of the update is {asked}")
    _check_layout(manifest.frames, layout)
    _check_layout(manifest.importance, importance)
    frames = [*manifest.frames, *manifest.importance]
    names = [manifest.codec] * len(manifest.frames) + [IMPORTANCE.name] * len(manifest.importance)
    ends = list(accumulate(frame.payload_bytes for frame in frames))
    payloads = memoryview(blob)[manifest.payload_start :]
    cut = [
        payloads[end - frame.payload_bytes : end] for frame, end in zip(frames, ends, strict=True)
    ]
    unpacked = list(_map(partial(_unpack_frame, manifest.meta), frames, cut, names))
    forms = dict(chain.from_iterable(unpacked[: len(manifest.frames)]))
    roots = dict(chain.from_iterable(unpacked[len(manifest.frames) :]))
    return manifest.meta, forms, squares(roots)


def _map(
    work: Callable[..., list[tuple[str, Form]]], *columns: Sequence[Any]
) -> Iterator[list[tuple[str, Form]]]:
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
