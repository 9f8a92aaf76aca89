"""The adapter a node holds between rounds, so that the next one can come as a change of it.

It lies in ``context.state``, which outlives the process of a message and not the SuperNode: a node
that lost it refuses the change, and is sent the whole adapter the next time.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context

from anabranch.client.records import pack, record_of, unpack
from anabranch.vectors import Adapter
from anabranch.wire.plan import RoundPlan, sent_down

HELD_KEY = "anabranch.held"
HELD_OF_KEY = "anabranch.held-of"


def held(context: Context, plan: RoundPlan, seeded: Adapter) -> tuple[str, Adapter]:
    """What this node holds in this run, and its hash; before anything came, the seed's draw.

    Args:
        context: The node's.
        plan: The round's.
        seeded: The draw.
    """
    about = record_of(context.state, HELD_OF_KEY, ConfigRecord)
    kept = record_of(context.state, HELD_KEY, ArrayRecord)
    if about is None or kept is None or about["run"] != plan.run:
        return seeded.hash(), seeded
    return str(about["hash"]), seeded.with_tensors({**seeded.tensors(), **unpack(kept)})


def hold(context: Context, plan: RoundPlan, adapter: Adapter) -> None:
    """Keep the round's start, without the factor that every client draws itself."""
    about = record_of(context.state, HELD_OF_KEY, ConfigRecord)
    if about is None or about["hash"] != plan.start_hash or about["run"] != plan.run:
        context.state[HELD_KEY] = pack(adapter.tensors(sent_down(plan.trains)))
        context.state[HELD_OF_KEY] = ConfigRecord({"hash": plan.start_hash, "run": plan.run})
