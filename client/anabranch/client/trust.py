"""The keys of a node: its own, and those by which it knows its coordinator.

They lie in a folder that the node's own configuration names (``keys``), or the environment
(``ANABRANCH_KEYS``); never the run's, which comes over the network. A node that has such a folder
takes no order that is not signed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable

from anabranch.client.order import plan_of
from anabranch.client.records import record_of
from anabranch.client.site import site_of
from anabranch.wire import WireError
from anabranch.wire.keys import PrivateKey, by_id, read_private, read_public
from anabranch.wire.manifest import Manifest
from anabranch.wire.plan import PLAN_KEY, Scalar
from anabranch.wire.signing import (
    PLAN_SIGNATURE_KEY,
    PLAN_SIGNER_KEY,
    KeyRing,
    check_message,
    check_plan,
)

PLAN_REFUSED = 1002
"""``Error.code`` of a reply: the order is not signed by a coordinator this node knows."""

KEYS_VARIABLE = "ANABRANCH_KEYS"
MEMBERS_FILE = "members.pub"
"""Public keys of the federation's clients, in a node's folder of keys. A node that has it sends its
updates under masks, or not at all."""


@dataclass(frozen=True)
class NodeKeys:
    """What a node signs with, and whom it obeys.

    Attributes:
        own: Signs its updates.
        coordinator: The keys in ``coordinator.pub``; several while one replaces another.
        folder: Where they lie.
        members: The keys in ``members.pub`` and its own; None where there is no such file.
    """

    own: PrivateKey
    coordinator: KeyRing
    folder: Path
    members: KeyRing | None = None

    def check_adapter(self, manifest: Manifest) -> None:
        """Check who signed an adapter, before anything of it is decoded.

        Raises:
            WireError: Not the coordinator.
        """
        check_message(manifest, self.coordinator)


def keys_of(node_config: Mapping[str, Scalar]) -> NodeKeys | None:
    """The node's keys; None where it has no folder of them.

    Raises:
        ValueError: A file in the folder is missing or cannot be used.
    """
    folder = node_config.get("keys") or os.environ.get(KEYS_VARIABLE)
    return _read(str(folder), site_of(node_config).name) if folder else None


@cache
def _read(folder: str, name: str) -> NodeKeys:
    where = Path(folder)
    coordinator = KeyRing(by_id(read_public(where / "coordinator.pub")))
    own, members = read_private(where / f"{name}.key"), None
    if (where / MEMBERS_FILE).exists():
        members = KeyRing(by_id([*read_public(where / MEMBERS_FILE), own.public]))
    return NodeKeys(own, coordinator, where, members)


def verify_plan(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Refuse an order that the coordinator did not sign, before anything of it is believed."""
    keys = keys_of(context.node_config)
    if keys is not None and message.metadata.message_type != MessageType.QUERY:
        record = record_of(message.content, PLAN_KEY, ConfigRecord) or ConfigRecord()
        plan, key_id, signature = (
            record.get(key) for key in (PLAN_KEY, PLAN_SIGNER_KEY, PLAN_SIGNATURE_KEY)
        )
        try:
            if not isinstance(key_id, bytes) or not isinstance(signature, bytes):
                raise WireError("unsigned", "there is no signature")
            check_plan(str(plan), key_id, signature, keys.coordinator)
            training = message.metadata.message_type == MessageType.TRAIN
            if training and keys.members is not None and plan_of(message).secure is None:
                raise WireError(
                    "unsecured", f"this node has {MEMBERS_FILE}, and sends no update without masks"
                )
        except WireError as error:
            return Message(
                Error(PLAN_REFUSED, f"the plan is refused ({error.code}): {error}"),
                reply_to=message,
            )
    return call_next(message, context)
