"""Collect replies by push and pull, until all have come or nothing more is waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from anabranch.coordinator.aside import Aside, lives, reaches_out
from anabranch.wire.errors import one_line

log = logging.getLogger("anabranch.coordinator")

GONE = "gone"
"""Code of an order that was lost on its way, or whose reply was: no word of the node's."""
GONE_ERRORS = (3, 4, 5)
"""Flower's ``ErrorCode`` of those: message, reply or node unavailable."""
LIVES_S = 5.0
"""Seconds between two looks at which nodes started anew."""


@dataclass(frozen=True)
class _Owed:
    """An order without a reply: its node and group, and the life of the node that was sent it."""

    node: int
    group: str
    life: str


@dataclass(frozen=True)
class Closed:
    """Why nothing more is waited for: a code, and the same in words."""

    code: str
    reason: str


@dataclass(frozen=True)
class Reply:
    """What came back for one order.

    Attributes:
        node: The node the order went to; the reply's own metadata is the sender's word.
        message: The reply; None when there is none that can be read.
        code: Why there is none: ``client-error``, ``unreadable``, ``undeliverable``, ``gone``,
            ``deadline`` or ``closed``; empty when there is one.
        reason: The same in words, one bounded line.
        group: The order's group: the number of its round.
    """

    node: int
    message: Message | None
    code: str = ""
    reason: str = ""
    group: str = ""


class Mail:
    """Orders on their way, and the replies to them as they arrive.

    Flower's own ``send_and_receive`` returns only when all are there; a round wants to admit each
    reply at once, so that what has arrived is safe when the coordinator dies.

    Args:
        grid: Flower's connection to the nodes.
        poll_s: Seconds between two looks for replies.
    """

    def __init__(self, grid: Grid, poll_s: float) -> None:
        self._grid, self._poll_s = grid, poll_s
        # A grid in this process has no lines that could break, and runs clients as it is pulled.
        self._aside = Aside(self._fetch) if reaches_out(grid) else None
        self._waiting: dict[str, _Owed] = {}  # by message
        self._look_at_s = 0.0

    def owed(self) -> list[tuple[int, str]]:
        """Node and group of every order without a reply."""
        return [(one.node, one.group) for one in self._waiting.values()]

    def send(self, orders: Sequence[Message]) -> list[Reply]:
        """Send orders, one per node; returns a reply for each that could not be delivered."""
        sent = [(one.metadata.dst_node_id, one.metadata.group_id) for one in orders]
        if not orders:
            return []
        living = lives(self._grid)
        identifiers = list(self._grid.push_messages(orders))
        # Flower answers None for a node that just left, and nothing at all for a push too large.
        identifiers += [""] * (len(sent) - len(identifiers))
        lost = []
        for (node, group), identifier in zip(sent, identifiers, strict=True):
            if identifier:
                self._waiting[identifier] = _Owed(node, group, living.get(node, ""))
            else:
                reason = "the order could not be delivered"
                lost.append(Reply(node, None, "undeliverable", reason, group))
        return lost

    def arrivals(
        self,
        closed: Callable[[], Closed | None],
        more: Callable[[], bool] = lambda: False,
    ) -> Iterator[Reply]:
        """Yield replies as they come, until there is no order left without one.

        Args:
            closed: Asked between two replies; what is not None ends it.
            more: Whether something else is waited for, once there is no such order.

        Raises:
            ConnectionError: The SuperLink is gone, which is no client's fault.
        """
        while self._waiting or more():
            arrived = False
            # One at a time: a reply that cannot be unpacked raises, and must not take others along.
            for identifier in list(self._waiting):
                reply = self._pull(identifier)
                if reply is not None:
                    arrived = True
                    yield reply
                    if closed() is not None:
                        return
            for reply in self._started_anew():
                arrived = True
                yield reply
            if closed() is not None:
                return
            if (self._waiting or more()) and not arrived:
                time.sleep(self._poll_s)

    def arrived(self) -> list[Reply]:
        """The replies that are there now; waits for none.

        Raises:
            ConnectionError: The SuperLink is gone.
        """
        found = [self._pull(identifier) for identifier in list(self._waiting)]
        return [reply for reply in found if reply is not None]

    def give_up(
        self, closed: Closed, which: Callable[[str], bool] = lambda group: True
    ) -> list[Reply]:
        """Wait no longer for replies to orders of some groups; returns one for each, with why."""
        given = [name for name, owed in self._waiting.items() if which(owed.group)]
        return [self._without(name, closed.code, closed.reason) for name in given]

    def _without(self, identifier: str, code: str, reason: str) -> Reply:
        """Wait no longer for the reply to an order."""
        owed = self._waiting.pop(identifier)
        if self._aside is not None:
            self._aside.forget(identifier)
        return Reply(owed.node, None, code, reason, owed.group)

    def _started_anew(self) -> list[Reply]:
        """One for each order whose node was gone since, and so has it no more."""
        now_s = time.monotonic()
        if now_s < self._look_at_s or not any(one.life for one in self._waiting.values()):
            return []
        self._look_at_s, living = now_s + LIVES_S, lives(self._grid)
        lost = [
            name
            for name, owed in self._waiting.items()
            if owed.life and living.get(owed.node, owed.life) != owed.life
        ]
        reason = "the node was gone for a while, or started anew, and lost the order"
        return [self._without(name, GONE, reason) for name in lost]

    def _fetch(self, identifier: str) -> Iterable[Message]:
        return self._grid.pull_messages([identifier])

    def _pull(self, identifier: str) -> Reply | None:
        owed = self._waiting[identifier]
        try:
            pull = self._fetch if self._aside is None else self._aside.pull
            pulled = list(pull(identifier))
        # Flower has tried again for a while by then.
        except httpx.HTTPError as error:
            raise ConnectionError(
                f"the SuperLink does not answer any more ({one_line(str(error))}); start it "
                "and run again: what was admitted is kept"
            ) from error
        # Whatever a client's bytes make Flower's unpacking raise is that client's refusal.
        except Exception as error:
            reason = one_line(f"the reply cannot be read: {type(error).__name__}: {error}")
            return self._without(identifier, "unreadable", reason)
        if not pulled:
            return None
        message = pulled[0]
        if message.has_error():
            code = GONE if message.error.code in GONE_ERRORS else "client-error"
            reason = one_line(message.error.reason or f"error {message.error.code}")
            return self._without(identifier, code, reason)
        del self._waiting[identifier]
        return Reply(owed.node, message, group=owed.group)


def replies(
    grid: Grid, orders: Sequence[Message], *, deadline_s: float, poll_s: float
) -> Iterator[Reply]:
    """Send orders and yield one reply for each, as they arrive; the missing ones at the end.

    Args:
        grid: Flower's connection to the nodes.
        orders: One per node.
        deadline_s: Seconds after which what has not come is left behind.
        poll_s: Seconds between two looks.

    Raises:
        ConnectionError: The SuperLink is gone, which is no client's fault.
    """
    end = time.monotonic() + deadline_s
    late = Closed("deadline", f"no reply within {deadline_s:g} s")
    mail = Mail(grid, poll_s)
    yield from mail.send(orders)
    yield from mail.arrivals(lambda: late if time.monotonic() >= end else None)
    yield from mail.give_up(late)
