"""A group in one round: what its members are asked, who dropped out, and what it came to."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from anabranch.coordinator.admission import layout_of
from anabranch.coordinator.secure.config import SecureConfig
from anabranch.coordinator.start import Start
from anabranch.coordinator.store import Contribution, Store
from anabranch.wire import UpdateMeta, encode_update
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import SecurePlan
from anabranch.wire.secure.flat import entries_of, unflatten
from anabranch.wire.secure.recovery import Recovery
from anabranch.wire.secure.session import SecureSession, secure_session, threshold_of
from anabranch.wire.signing import KeyRing


@dataclass
class Group:
    """Clients whose updates come as one sum.

    Attributes:
        number: Of the group in its round.
        names: The clients asked.
        start: What they are handed: their plan is the group's own.
        session: What they must agree on.
        recovery: What they have said.
        lost: Why nothing comes of it any more; empty while something may.
        dropped: The phase in which a client dropped out, by name.
    """

    number: int
    names: tuple[str, ...]
    start: Start
    session: SecureSession
    recovery: Recovery
    lost: str = ""
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its contribution to the merge is called."""
        return f"group-{self.number}"

    def facts(self, summed: tuple[str, ...]) -> dict[str, Any]:
        """What the journal keeps: whose updates the sum is of, who dropped out and when."""
        return {
            "round": self.session.round,
            "group": self.name,
            "asked": list(self.names),
            "summed": list(summed),
            "dropped": dict(sorted(self.dropped.items())),
            "threshold": self.session.threshold,
            "lost": self.lost,
        }


def form(
    number: int, names: tuple[str, ...], secure: SecureConfig, whole: Start, ring: KeyRing
) -> Group:
    """A group of these clients.

    Args:
        number: Of the group in its round.
        names: The clients.
        secure: The federation's ``secure`` section.
        whole: What the round hands out.
        ring: The enrolled keys.

    Raises:
        ValueError: They are too few to hide anybody.
    """
    asked = SecurePlan(
        group=number,
        members=len(names),
        threshold=threshold_of(len(names), secure.threshold),
        entries=entries_of(layout_of(whole.adapter, whole.plan.trained)),
        clip=secure.clip,
        bits=secure.bits,
    )
    plan = whole.plan.model_copy(update={"secure": asked})
    session = secure_session(plan, plan.model_dump_json())
    return Group(number, names, replace(whole, plan=plan), session, Recovery(session, ring))


def contribute(
    group: Group, claimed: Mapping[str, dict[str, float]], store: Store, key: PrivateKey
) -> tuple[str, ...]:
    """Open a group's sum and keep its mean as an update of the group, signed by the coordinator.

    Args:
        group: The group.
        claimed: What its clients claim of their training, by name.
        store: Where it is kept, as one contribution.
        key: The coordinator's.

    Returns:
        Whose updates are in it.

    Raises:
        WireError: The sum cannot be opened.
        FullError: There is no room for it.
    """
    total_D, names = group.recovery.total()
    plan, nonce = group.start.plan, secrets.token_bytes(16)
    layout = layout_of(group.start.adapter, plan.trained)
    rows = [claimed[name] for name in names]
    meta = UpdateMeta(
        kind="update",
        base_hash=plan.base_hash,
        start_hash=plan.start_hash,
        federation=plan.federation,
        run=plan.run,
        round=plan.round,
        client=group.name,
        nonce=nonce,
        seed=plan.seed,
        examples=int(sum(row.get("num-examples", 0) for row in rows)),
        issued_s=int(time.time()),
    )
    blob = encode_update(unflatten(total_D / len(names), layout), meta, plan.codec, key).blob
    shared = sorted(set.intersection(*(set(row) for row in rows)))
    store.admit(
        Contribution(
            round=plan.round,
            client=group.name,
            digest=store.put(blob),
            size_bytes=len(blob),
            nonce=nonce.hex(),
            metrics={name: fmean(row[name] for row in rows) for name in shared},
        )
    )
    return names
