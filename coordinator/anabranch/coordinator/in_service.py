"""The adapter in service: what the next round starts from, and how it reaches the clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.start import Start
from anabranch.coordinator.store import Store
from anabranch.vectors import Adapter
from anabranch.vectors.frozen import from_tensors, split
from anabranch.wire import compensate, decode_adapter, encode_adapter, encode_change, remainder
from anabranch.wire.config import CodecConfig
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import RoundPlan, sent_down


@dataclass(frozen=True)
class InService:
    """An adapter as every client that decodes it holds it, to the bit.

    Attributes:
        adapter: Its trained ranks, then the frozen ones.
        seeded: The draw that a federation begins from.
        blob: It as it is sent; None while the seed alone describes it.
        change: Hash of the adapter before it and the encoded change from that; None where adapters
            travel whole.
        owed: What coding left out of that change, by tensor.
    """

    adapter: Adapter
    seeded: Adapter
    blob: bytes | None = None
    change: tuple[str, bytes] | None = None
    owed: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """The adapter's; it is read for every plan and reply, and taken once."""
        return self.adapter.hash()

    def start(self, plan: RoundPlan, key: PrivateKey | None) -> Start:
        """What a round with this plan hands the clients that train all ranks."""
        return Start(plan, *split(self.adapter, self.seeded), self.blob, key, self.change)


def in_service(blob: bytes, seeded: Adapter, config: FederationConfig) -> InService:
    """The adapter that was sent as ``blob``."""
    return InService(decode_adapter(blob, seeded, config.trains), seeded, blob)


def read_in_service(store: Store, seeded: Adapter, config: FederationConfig) -> InService:
    """The adapter that a store holds as the latest, or the seeded draw where it holds none."""
    latest = store.latest()
    if latest is None:
        return InService(seeded, seeded)
    return in_service(store.get(latest.digest), seeded, config)


def successor(
    before: InService,
    merged: Adapter,
    plan: RoundPlan,
    config: FederationConfig,
    key: PrivateKey | None,
) -> InService:
    """What stands in service after ``before`` once ``merged`` is published.

    It is what clients will decode, which a lossy way down makes differ from ``merged``.

    Args:
        before: The adapter in service.
        merged: What the round's merge made.
        plan: The round's.
        config: The federation: how adapters travel down.
        key: Who signs; None leaves them unsigned.
    """
    change, owed = before.change, before.owed
    if config.down_codec is not None:
        merged, change, owed = _by_change(before, merged, plan, config.down_codec, key)
    encoded = encode_adapter(merged, plan, config.down, key)
    adapter = from_tensors(before.seeded, {**merged.tensors(), **encoded.sent})
    return InService(adapter, before.seeded, encoded.blob, change, owed)


def _by_change(
    before: InService,
    merged: Adapter,
    plan: RoundPlan,
    codec: CodecConfig,
    key: PrivateKey | None,
) -> tuple[Adapter, tuple[str, bytes], Mapping[str, Tensor]]:
    """The adapter that clients come to who add the coded change to the one they hold.

    Returns:
        It, the change from which adapter, and what coding left out.
    """
    held = before.adapter.tensors(sent_down(plan.trains))
    after = merged.tensors(sent_down(plan.trains))
    change = {name: after[name].float() - held[name].float() for name in held}
    wanted = compensate(change, before.owed, codec.feedback)
    encoded = encode_change(wanted, plan, codec, key)
    owed = remainder(wanted, encoded.sent) if codec.feedback else {}
    moved = {name: held[name] + encoded.sent[name] for name in held}
    adapter = before.adapter.with_tensors({**before.adapter.tensors(), **moved})
    return adapter, (before.hash, encoded.blob), owed
