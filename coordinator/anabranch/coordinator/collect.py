"""Collect replies by push and pull, until all have come or the deadline is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from anabranch.wire.errors import one_line

log = logging.getLogger("anabranch.coordinator")


@dataclass(frozen=True)
class Reply:
    """What came back for one order.

    Attributes:
        node: The node the order went to; the reply's own metadata is the sender's word.
        message: The reply; None when there is none that can be read.
        code: Why there is none: ``client-error``, ``unreadable``, ``undeliverable`` or
            ``deadline``; empty when there is one.
        reason: The same in words, one bounded line.
    """

    node: int
    message: Message | None
    code: str = ""
    reason: str = ""


def replies(
    grid: Grid, orders: Sequence[Message], *, deadline_s: float, poll_s: float
) -> Iterator[Reply]:
    """Send orders and yield one reply for each, as they arrive; the missing ones at the end.

    Flower's own ``send_and_receive`` returns only when all are there; a round wants to admit each
    reply at once, so that what has arrived is safe when the coordinator dies.

    Args:
        grid: Flower's connection to the nodes.
        orders: One per node.
        deadline_s: Seconds after which what has not come is left behind.
        poll_s: Seconds between two looks.

    Raises:
        ConnectionError: The SuperLink is gone, which is no client's fault.
    """
    end = time.monotonic() + deadline_s
    nodes = [order.metadata.dst_node_id for order in orders]
    identifiers = list(grid.push_messages(orders)) if orders else []
    # Flower answers None for a node that just left, and nothing at all for a push too large.
    identifiers += [""] * (len(nodes) - len(identifiers))
    waiting: dict[str, int] = {}
    for node, identifier in zip(nodes, identifiers, strict=True):
        if identifier:
            waiting[identifier] = node
        else:
            yield Reply(node, None, "undeliverable", "the order could not be delivered")
    while waiting:
        arrived = False
        # One at a time: a reply that cannot be unpacked raises, and must not take others with it.
        for identifier in list(waiting):
            try:
                pulled = list(grid.pull_messages([identifier]))
            # Flower has tried again for a while by then.
            except httpx.HTTPError as error:
                raise ConnectionError(
                    f"the SuperLink does not answer any more ({one_line(str(error))}); start it "
                    "and run again: what was admitted is kept"
                ) from error
            # Whatever a client's bytes make Flower's unpacking raise is that client's refusal.
            except Exception as error:
                reason = one_line(f"the reply cannot be read: {type(error).__name__}: {error}")
                yield Reply(waiting.pop(identifier), None, "unreadable", reason)
                arrived = True
                continue
            if pulled:
                yield _reply(waiting.pop(identifier), pulled[0])
                arrived = True
        if time.monotonic() >= end:
            break
        if waiting and not arrived:
            time.sleep(poll_s)
    for node in waiting.values():
        yield Reply(node, None, "deadline", f"no reply within {deadline_s:g} s")


def _reply(node: int, message: Message) -> Reply:
    if message.has_error():
        reason = one_line(message.error.reason or f"error {message.error.code}")
        return Reply(node, None, "client-error", reason)
    return Reply(node, message)
