"""A client's part in secure aggregation: the phases beside training, and the masked update.

A node that has ``members.pub`` in its folder of keys takes part; a list of the other clients' keys,
brought there by somebody other than the coordinator. Shape legend: D entries of an update.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from torch import Tensor

from anabranch.client.order import plan_of
from anabranch.client.records import as_array, record_of
from anabranch.client.site import site_of
from anabranch.client.steps import take_step
from anabranch.client.trust import MEMBERS_FILE, keys_of
from anabranch.wire import WireError
from anabranch.wire.errors import one_line
from anabranch.wire.plan import (
    CLIENT_KEY,
    PLAN_KEY,
    SECURE_KEY,
    SECURE_STYPE,
    RoundPlan,
)
from anabranch.wire.secure.flat import flatten, unflatten
from anabranch.wire.secure.member import SecureMember
from anabranch.wire.secure.session import secure_session

SECURE_REFUSED = 1003
"""``Error.code`` of a reply: this node does not take the step it was asked to take."""
STATE_KEY = "anabranch.secure"
LEAST_KEY = "secure-least"
"""Of a node's own configuration: the smallest threshold that it takes part under."""


def take_part(message: Message, context: Context, phase: str) -> Message:
    """Answer a message of a phase beside training."""
    steps: dict[str, Callable[[SecureMember, bytes], bytes]] = {
        "advertise": lambda member, _: member.advertise(),
        "deal": lambda member, said: member.deal(said),
        "confirm": lambda member, said: member.confirm(said),
        "open": lambda member, said: member.open(said),
    }
    plan = plan_of(message)
    try:
        member = _member(message, context, plan, phase)
        said = steps[phase](member, _said(message))
    except ValueError as error:
        reason = one_line(f"{getattr(error, 'code', 'refused')}: {error}")
        return Message(Error(SECURE_REFUSED, reason), reply_to=message)
    if phase != "open":
        _keep(context, member)
    site = site_of(context.node_config)
    content = RecordDict(
        {
            SECURE_KEY: ArrayRecord({SECURE_KEY: as_array(said, SECURE_STYPE, plan)}),
            CLIENT_KEY: ConfigRecord({CLIENT_KEY: site.name}),
        }
    )
    return Message(content, reply_to=message)


def mask(
    message: Message, context: Context, plan: RoundPlan, wanted: dict[str, Tensor]
) -> tuple[bytes, dict[str, Tensor]]:
    """An update under its masks.

    Args:
        message: The order to train, with what the other members dealt.
        context: Holds the member between phases.
        plan: The order's plan.
        wanted: The update, by name.

    Returns:
        What to send, and the update as it counts in the sum: clipped and rounded.

    Raises:
        ValueError: A step out of turn, or an update that is not the one the plan speaks of.
    """
    member = _member(message, context, plan, "mask")
    fixed = member.session.fixed
    words_D = fixed.encode(flatten(wanted))
    layout = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    sent = unflatten(fixed.decode(words_D, 1), layout)
    said = member.mask(_said(message), words_D)
    _keep(context, member)
    return said, sent


def _member(message: Message, context: Context, plan: RoundPlan, phase: str) -> SecureMember:
    """This node's member of the plan's session, about to take a step that it has not taken."""
    keys = keys_of(context.node_config)
    if keys is None or keys.members is None:
        raise ValueError(
            f"this node knows no other members; put {MEMBERS_FILE} with their public keys, which "
            "did not come from the coordinator, into its folder of keys"
        )
    record = record_of(message.content, PLAN_KEY, ConfigRecord)
    assert record is not None
    session = secure_session(plan, str(record[PLAN_KEY]))
    least = int(context.node_config.get(LEAST_KEY, 0))
    if session.threshold < least:
        raise WireError(
            "threshold", f"this node asks for a threshold of {least}, this is {session.threshold}"
        )
    take_step(keys.folder / f"{keys.own.name}.steps", plan, phase)
    if phase == "advertise":
        return SecureMember(session, keys.own, keys.members)
    state = record_of(context.state, STATE_KEY, ConfigRecord)
    kept = state.get(STATE_KEY) if state is not None else None
    if STATE_KEY in context.state:
        del context.state[STATE_KEY]  # whatever fails from here on, no secret stays
    if not isinstance(kept, bytes):
        raise WireError("phase", "this node has lost what it began the round with")
    return SecureMember.from_bytes(kept, session, keys.own, keys.members)


def _said(message: Message) -> bytes:
    """What the coordinator hands on."""
    record = record_of(message.content, SECURE_KEY, ArrayRecord)
    if record is None:
        return b""
    return bytes(record[SECURE_KEY].data)


def _keep(context: Context, member: SecureMember) -> None:
    context.state[STATE_KEY] = ConfigRecord({STATE_KEY: member.to_bytes()})
