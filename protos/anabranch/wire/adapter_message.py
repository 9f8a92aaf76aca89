"""Adapters on their way to the clients: what travels of one, and what a receiver takes up."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from anabranch.vectors import Adapter
from anabranch.vectors.adapter import A_SUFFIX, B_SUFFIX
from anabranch.vectors.frozen import from_tensors, most_ranks, whole_layout
from anabranch.wire.config import CodecConfig, DenseDtype
from anabranch.wire.decode import Check, decode_update
from anabranch.wire.encode import Encoded, encode_update
from anabranch.wire.errors import WireError
from anabranch.wire.header import read_manifest
from anabranch.wire.keys import PrivateKey
from anabranch.wire.limits import limits_for
from anabranch.wire.manifest import Kind, UpdateMeta
from anabranch.wire.plan import RoundPlan, Trains, sent_down


def encode_adapter(
    adapter: Adapter, plan: RoundPlan, down: DenseDtype, key: PrivateKey | None = None
) -> Encoded:
    """Encode the adapter that a round made, without the factor that every client draws itself.

    Args:
        adapter: Trained ranks first, frozen ones after them (``vectors.frozen``).
        plan: The round's.
        down: How an entry is stored.
        key: Who signs; None leaves the message unsigned.
    """
    meta = _meta("adapter", plan)
    tensors = adapter.tensors(sent_down(plan.trains))
    return encode_update(tensors, meta, CodecConfig(name="dense", dtype=down), key)


def encode_change(
    wanted: Mapping[str, Tensor],
    plan: RoundPlan,
    codec: CodecConfig,
    key: PrivateKey | None = None,
) -> Encoded:
    """Encode what a round adds to the adapter that its clients hold.

    Args:
        wanted: What to add, by name, of all that travels down.
        plan: The round's; what they hold is its start.
        codec: How to encode it.
        key: Who signs; None leaves the message unsigned.
    """
    return encode_update(wanted, _meta("change", plan), codec, key)


def decode_change(
    blob: bytes | memoryview, held: Adapter, trains: Trains, check: Check | None = None
) -> Adapter:
    """Add a change to the adapter that a client holds.

    Args:
        blob: The message, as it came.
        held: The adapter it is to change.
        trains: What the federation trains.
        check: Called with the manifest before any payload is touched (``wire.signing``).

    Raises:
        WireError: The message is no sound one of this adapter's layout, or no change.
    """
    before = held.tensors(sent_down(trains))
    layout = {name: tuple(tensor.shape) for name, tensor in before.items()}
    meta, tensors = decode_update(blob, layout, check)
    if meta.kind != "change":
        raise WireError("meta", f"a change was announced, and this is an {meta.kind}")
    moved = {name: before[name] + change for name, change in tensors.items()}
    return held.with_tensors({**held.tensors(), **moved})


def _meta(kind: Kind, plan: RoundPlan) -> UpdateMeta:
    """What is said of a message from the coordinator."""
    return UpdateMeta(
        kind=kind,
        base_hash=plan.base_hash,
        start_hash=plan.start_hash,
        federation=plan.federation,
        run=plan.run,
        round=plan.round,
        client="",
        nonce=b"",
        seed=plan.seed,
        examples=0,
    )


def decode_adapter(
    blob: bytes | memoryview, known: Adapter, trains: Trains, check: Check | None = None
) -> Adapter:
    """Decode an adapter, with the ranks that are frozen in it.

    Args:
        blob: The message, as it came.
        known: The seeded start, at the receiver's rank: gives names, shapes, the fewest ranks, and
            what does not travel.
        trains: What the federation trains.
        check: Called with the manifest before any payload is touched (``wire.signing``).

    Raises:
        WireError: The message is no sound one of such an adapter; more ranks than a matrix can have
            are refused before they are decoded.
    """
    layout = {
        name: tuple(tensor.shape) for name, tensor in known.tensors(sent_down(trains)).items()
    }
    if sent_down(trains) == "both":
        largest = dict(layout)
        for name, most in most_ranks(known).items():
            largest[name + A_SUFFIX] = (most, layout[name + A_SUFFIX][1])
            largest[name + B_SUFFIX] = (layout[name + B_SUFFIX][0], most)
        manifest = read_manifest(blob, limits_for(largest))
        rows = [row for frame in manifest.frames for row in frame.tensors]
        layout = whole_layout(known, {row.name: row.shape for row in rows})
    _, tensors = decode_update(blob, layout, check)
    return from_tensors(known, {**known.tensors(), **tensors})
