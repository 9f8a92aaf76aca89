"""How a receipt names the updates that went into a round.

By the sha256 of their bytes, as the artifacts are named. Where rounds are private nothing that
leaves the coordinator may tell of one update without noise on it, and a hash does: whoever guesses
an update can check the guess. There the name is a hash keyed by a secret that stays in the store,
so that whoever has the store can still tell that an update is the one that was merged.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import Contribution, Store
from anabranch.coordinator.store.base import SECRET_EVENT
from anabranch.wire.receipt import Input, Receipt

CONTEXT = b"anabranch.receipt.input/1\0"


def name_of(store: Store, config: FederationConfig, row: Contribution) -> str:
    """What the receipts of a federation call an admitted update."""
    if config.privacy is None:
        return row.digest
    rows = store.notes(SECRET_EVENT)
    if not rows:
        store.note(SECRET_EVENT, {"secret": secrets.token_hex(32)})
        # Another process may have been first, and its word counts.
        rows = store.notes(SECRET_EVENT)
    return _keyed(bytes.fromhex(rows[0]["secret"]), row)


def size_of(config: FederationConfig, row: Contribution) -> int:
    """The size that receipts tell: of what was coded, it depends on what it codes."""
    return row.size_bytes if config.privacy is None else 0


def digest_of(store: Store, receipt: Receipt, one: Input) -> str:
    """The artifact of an update that a receipt names.

    Raises:
        KeyError: The store knows of no update with this name, or has lost the secret.
    """
    if not is_private(receipt):
        return one.artifact
    rows = [row for row in store.contributions(one.round) if row.client == one.client]
    keys = [bytes.fromhex(row["secret"]) for row in store.notes(SECRET_EVENT)[:1]]
    for row in rows:
        # An earlier release wrote the sha256 itself.
        if one.artifact in (row.digest, *(_keyed(key, row) for key in keys)):
            return row.digest
    raise KeyError(f"no update of {one.client} in round {one.round} goes by {one.artifact}")


def is_private(receipt: Receipt) -> bool:
    """Whether a receipt is of a private round."""
    return receipt.settings.get("privacy") is not None


def _keyed(key: bytes, row: Contribution) -> str:
    about = f"{row.round}\0{row.client}\0{row.digest}".encode()
    return hmac.new(key, CONTEXT + about, hashlib.sha256).hexdigest()
