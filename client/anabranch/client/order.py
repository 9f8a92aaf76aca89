"""What a message orders."""

from __future__ import annotations

from functools import lru_cache

from flwr.app import ConfigRecord, Message

from anabranch.client.records import record_of
from anabranch.wire.plan import PLAN_KEY, RoundPlan


def plan_of(message: Message) -> RoundPlan:
    """The plan a message carries.

    Raises:
        ValueError: It carries none, or a broken one.
    """
    record = record_of(message.content, PLAN_KEY, ConfigRecord)
    if record is None:
        raise ValueError("the message holds no round plan; is the coordinator Anabranch's?")
    return _parsed(str(record[PLAN_KEY]))


@lru_cache(maxsize=4)
def _parsed(plan: str) -> RoundPlan:
    return RoundPlan.model_validate_json(plan)
