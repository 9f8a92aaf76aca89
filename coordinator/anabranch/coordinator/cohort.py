"""A round's cohort: replies admitted one by one, and what each client trained, for the merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from anabranch.coordinator.admission import Examined, RefusedError, examine, layouts
from anabranch.coordinator.collect import Reply
from anabranch.coordinator.start import Start
from anabranch.coordinator.store import Contribution, FullError, Store, TakenError
from anabranch.coordinator.trust import Trust
from anabranch.vectors import Adapter
from anabranch.vectors.importance import from_flat_importance
from anabranch.wire import decode_forms
from anabranch.wire.codecs.codec import Form
from anabranch.wire.plan import UPDATE_KEY

Decoded = tuple[Mapping[str, Form], Mapping[str, Tensor]]
"""An update's changes and their importance."""

NO_ROOM = "no-room"
"""The code of an update that the store had no room for."""

DECODED_BYTES = 256 << 20
"""Decoded updates kept from admission to the merge; what is beyond is decoded again."""


class Cohort:
    """The updates admitted to a round. They are safe in the store before they count.

    Args:
        store: Where they are kept.
        trust: Keys, where the federation is signed.
        max_norm: Largest ‖update‖₂ admitted; None sets no cap.
    """

    def __init__(self, store: Store, trust: Trust | None, max_norm: float | None) -> None:
        self._store, self._trust, self._max_norm = store, trust, max_norm
        self._decoded: dict[str, Decoded] = {}

    def admit(self, reply: Reply, start: Start, client: str) -> None:
        """Count a client's reply.

        Args:
            reply: What came back.
            start: What the client was handed.
            client: Its name.

        Raises:
            RefusedError: It does not count, and why.
        """
        if reply.message is None:
            raise RefusedError(reply.code, reply.reason)
        examined = examine(reply.message, start, client, self._max_norm, self._trust)
        contribution = keep(self._store, examined, start, self._trust)
        held = sum(change.nbytes for change in examined.changes.values())
        held += sum(part.nbytes for part in examined.importance.values())
        if (len(self._decoded) + 1) * held <= DECODED_BYTES:
            self._decoded[contribution.digest] = (examined.changes, examined.importance)

    def end(self, row: Contribution, start: Start) -> Adapter:
        """What a client trained: its start and the change it sent, and how much that matters to it.

        Raises:
            ValueError: It was made from another start.
        """
        kept = self._decoded.pop(row.digest, None)
        changes, importance = kept or self._decode(row, start)
        before = start.adapter.tensors()
        moved = {name: before[name] + change.dense() for name, change in changes.items()}
        end = start.adapter.with_tensors({**before, **moved})
        return replace(end, importance=from_flat_importance(importance))

    def _decode(self, row: Contribution, start: Start) -> Decoded:
        """An update that was not kept in memory, out of its artifact."""
        meta, changes, importance = decode_forms(
            self._store.get(row.digest), *layouts(start.adapter, start.plan)
        )
        # The SVD of another machine may turn a truncated start differently.
        if meta.start_hash != start.plan.start_hash:
            raise ValueError(
                f"{row.client} trained from {meta.start_hash[:12]}, which this machine makes "
                f"{start.plan.start_hash[:12]}; finish a round where it was begun"
            )
        return changes, importance


def keep(
    store: Store,
    examined: Examined,
    start: Start,
    trust: Trust | None,
    collecting: bool = False,
    put: Callable[[], str] | None = None,
) -> Contribution:
    """Count an update that was examined: its bytes are safe first, its row second.

    Args:
        store: Where.
        examined: The update.
        start: What its client was handed.
        trust: Keys, where the federation is signed.
        collecting: Only while its round still collects, which another process may end.
        put: Keeps its bytes and says their digest; None puts them into the store.

    Raises:
        RefusedError: ``duplicate``, ``no-room`` or ``closed``.
    """
    try:
        contribution = Contribution(
            round=start.plan.round,
            client=examined.client,
            digest=put() if put else store.put(examined.blob),
            size_bytes=examined.size_bytes,
            nonce=examined.meta.nonce.hex(),
            metrics=dict(examined.metrics),
        )
        admit = store.admit_collecting if collecting else store.admit
        counted = admit(contribution)
    except FullError as error:
        raise RefusedError(NO_ROOM, str(error)) from error
    except TakenError as error:
        raise RefusedError("closed", str(error)) from error
    if not counted:
        raise RefusedError("duplicate", "this client already has an update in this round")
    if trust is not None:
        trust.nonces.add(contribution.nonce)
    return contribution


def update_bytes(reply: Reply) -> int:
    """Bytes of the update that a reply carries."""
    record = reply.message.content.array_records.get(UPDATE_KEY) if reply.message else None
    return sum(len(array.data) for array in record.values()) if record else 0
