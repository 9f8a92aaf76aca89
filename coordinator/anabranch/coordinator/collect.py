"""Collect replies by push and pull, until all have come or the deadline is over."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid


def replies(
    grid: Grid, messages: Sequence[Message], *, deadline_s: float, poll_s: float
) -> Iterator[Message]:
    """Send messages and yield each reply as it arrives.

    Flower's own ``send_and_receive`` returns only when all are there; a round wants to admit each
    reply at once, so that what has arrived is safe when the coordinator dies.

    Args:
        grid: Flower's connection to the nodes.
        messages: One per node.
        deadline_s: Seconds after which what has not come is left behind.
        poll_s: Seconds between two looks.
    """
    end = time.monotonic() + deadline_s
    # A node that just left gets no message: Flower then returns None in its place.
    waiting = {identifier for identifier in grid.push_messages(messages) if identifier}
    while waiting:
        arrived = list(grid.pull_messages(sorted(waiting)))
        # Sorted, so that replies that arrive together are handled in one order.
        for message in sorted(arrived, key=lambda reply: reply.metadata.src_node_id):
            if message.metadata.reply_to_message_id in waiting:
                waiting.remove(message.metadata.reply_to_message_id)
                yield message
        if time.monotonic() >= end:
            return
        if waiting and not arrived:
            time.sleep(poll_s)
