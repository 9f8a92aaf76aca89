"""What a round hands its clients: the plan and the adapter in service, at the rank of each.

FlexLoRA (2402.11505) gives every client the best approximation at its rank, HetLoRA (2401.06432)
the leading rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from anabranch.aggregation import MergeMethod, truncate
from anabranch.vectors import Adapter
from anabranch.wire import Encoded, UpdateMeta, encode_update
from anabranch.wire.config import CodecConfig, DenseDtype
from anabranch.wire.plan import ADAPTER_KEY, ADAPTER_STYPE, PLAN_KEY, RoundPlan, sent_down


@dataclass(frozen=True)
class Start:
    """What a round hands the clients of one rank.

    Attributes:
        plan: Their order.
        adapter: What they start from.
        blob: The same as it is sent; None while the seed alone describes it.
    """

    plan: RoundPlan
    adapter: Adapter
    blob: bytes | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the adapter on its way to one client."""
        return len(self.blob or b"")

    @cached_property
    def content(self) -> RecordDict:
        """The message to each of them."""
        plan = ConfigRecord(
            {PLAN_KEY: self.plan.model_dump_json(), "server-round": self.plan.round}
        )
        content = RecordDict({PLAN_KEY: plan})
        if self.blob is not None:
            content[ADAPTER_KEY] = adapter_record(self.blob)
        return content


def adapter_record(blob: bytes | None) -> ArrayRecord:
    """An encoded adapter as a record; an empty one while the seed alone describes it."""
    if blob is None:
        return ArrayRecord()
    return ArrayRecord({ADAPTER_KEY: Array("uint8", (len(blob),), ADAPTER_STYPE, blob)})


def encode_adapter(adapter: Adapter, plan: RoundPlan, down: DenseDtype) -> Encoded:
    """An adapter as it is sent: without the factor that every client draws from the seed."""
    meta = UpdateMeta(
        kind="adapter",
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
    tensors = adapter.tensors(sent_down(plan.trains))
    return encode_update(tensors, meta, CodecConfig(name="dense", dtype=down))


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
    # Every client draws the leading part of a seeded start by itself.
    leading = whole.blob is None or method.weigh is not None
    adapter = whole.adapter.leading(rank) if leading else truncate(whole.adapter, rank)
    blob = None
    if whole.blob is not None:
        encoded = encode_adapter(adapter, whole.plan, down)
        adapter, blob = adapter.with_tensors(encoded.sent), encoded.blob
    changes = {"rank": rank, "start_hash": adapter.hash()}
    return Start(whole.plan.model_copy(update=changes), adapter, blob)


def check_ranks(ranks: Mapping[str, int], template: Adapter, method: MergeMethod) -> None:
    """Refuse ranks that no round could use.

    Raises:
        ValueError: One above the start adapter's, or a method that needs one rank of all.
    """
    own = max((factors.rank for factors in template.lora.values()), default=0)
    for client, rank in ranks.items():
        if rank > own:
            raise ValueError(
                f"ranks.{client}: {rank} is above {own}, the rank of the adapter; lower it"
            )
    if ranks and method.factors and method.merge is not None and method.weigh is None:
        raise ValueError(
            f"ranks: {method.name} averages factors of one rank; "
            "set recipe.method to hetlora, or to one that merges ΔW, such as mean"
        )
