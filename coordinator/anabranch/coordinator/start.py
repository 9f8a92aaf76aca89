"""What a round hands its clients: the plan and the adapter in service, at the rank of each.

FlexLoRA (2402.11505) gives every client the best approximation at its rank, HetLoRA (2401.06432)
the leading rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from anabranch.aggregation import MergeMethod, truncate
from anabranch.vectors import Adapter, LowRank
from anabranch.vectors.frozen import from_tensors, join, split
from anabranch.wire import encode_adapter
from anabranch.wire.config import DenseDtype
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import ADAPTER_KEY, ADAPTER_STYPE, CHANGE_STYPE, PLAN_KEY, RoundPlan
from anabranch.wire.signing import PLAN_SIGNATURE_KEY, PLAN_SIGNER_KEY, sign_plan


@dataclass(frozen=True)
class Start:
    """What a round hands the clients of one rank.

    Attributes:
        plan: Their order.
        adapter: What they train on from.
        frozen: What is kept beside it, by module.
        blob: Both as they are sent; None while the seed alone describes them.
        key: Who signs; None leaves all unsigned.
        change: Hash of the adapter before it and the change from that, where clients hold adapters.
    """

    plan: RoundPlan
    adapter: Adapter
    frozen: Mapping[str, LowRank]
    blob: bytes | None
    key: PrivateKey | None = None
    change: tuple[str, bytes] | None = None

    def sent(self, holds: str | None) -> bytes | None:
        """What is sent of the adapter to a client that holds one of this hash; None for nothing."""
        if self.blob is None or holds == self.plan.start_hash:
            return None
        if self.change is not None and holds == self.change[0]:
            return min(self.change[1], self.blob, key=len)
        return self.blob

    @cached_property
    def norms(self) -> dict[str, float]:
        """‖·‖₂ in fp64 of each of the adapter's tensors."""
        return {
            name: float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
            for name, tensor in self.adapter.tensors().items()
        }

    def content(self, sent: bytes | None) -> RecordDict:
        """The message to a client that is sent this of the adapter."""
        if sent not in self._contents:
            self._contents[sent] = self._content(sent)
        return self._contents[sent]

    @cached_property
    def _contents(self) -> dict[bytes | None, RecordDict]:
        """Those that were made: many clients are sent the same."""
        return {}

    def _content(self, sent: bytes | None) -> RecordDict:
        text = self.plan.model_dump_json()
        plan = ConfigRecord({PLAN_KEY: text, "server-round": self.plan.round})
        if self.key is not None:
            plan[PLAN_SIGNER_KEY] = self.key.public.id
            plan[PLAN_SIGNATURE_KEY] = sign_plan(text, self.key)
        content = RecordDict({PLAN_KEY: plan})
        if sent is not None:
            content[ADAPTER_KEY] = adapter_record(
                sent, ADAPTER_STYPE if sent is self.blob else CHANGE_STYPE
            )
        return content


def adapter_record(blob: bytes | None, stype: str = ADAPTER_STYPE) -> ArrayRecord:
    """An encoded adapter as a record; an empty one while the seed alone describes it."""
    if blob is None:
        return ArrayRecord()
    return ArrayRecord({ADAPTER_KEY: Array("uint8", (len(blob),), stype, blob)})


def at_rank(whole: Start, rank: int, method: MergeMethod, down: DenseDtype) -> Start:
    """A round's start for the clients of a lower rank.

    Factors that are merged as they are, padded, must stand in the basis of the whole: their start
    is its leading part. Where ΔW is merged, it is the best approximation.

    Args:
        whole: The start of the clients that train all ranks.
        rank: Largest rank of a module.
        method: How the cohort will be merged.
        down: How the adapter is stored on its way.
    """
    # The leading part of a seeded start every client draws by itself.
    leading = whole.blob is None or method.weigh is not None
    adapter = whole.adapter.leading(rank) if leading else truncate(whole.adapter, rank)
    sent, blob = adapter, None
    if whole.blob is not None:
        encoded = encode_adapter(join(adapter, whole.frozen), whole.plan, down, whole.key)
        sent, blob = from_tensors(adapter, encoded.sent), encoded.blob
    changes = {"rank": rank, "start_hash": sent.hash()}
    return Start(whole.plan.model_copy(update=changes), *split(sent, adapter), blob, whole.key)
