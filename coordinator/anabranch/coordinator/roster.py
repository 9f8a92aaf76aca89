"""Who is there: nodes, the names they were met under, and whom a round asks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence, Set

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from anabranch.coordinator.collect import Closed, Mail, Reply
from anabranch.wire.errors import one_line
from anabranch.wire.keys import NAME
from anabranch.wire.plan import CLIENT_KEY

MEET_S = 120.0
"""Seconds a new node has to say its name; it is asked again after as long."""


class Roster:
    """The nodes a coordinator knows by name.

    Flower draws node numbers anew in each run; names are what a seed can sample and what a
    contribution is counted under.

    Args:
        poll_s: Seconds between two looks for replies.
        on_trouble: Told of every node that could not be met, and why.
        uploaders: Says which clients take part without a node, by uploading; they are known under
            numbers below 0, which no node has.
        on_met: Told of every node that said its name.
        met: What ``on_met`` was told in earlier runs. Flower keeps a SuperNode's number as long as
            it keeps its own database, and gives it to no other: who was met need not be asked.
    """

    def __init__(
        self,
        poll_s: float,
        on_trouble: Callable[[str, str], None],
        uploaders: Callable[[], Sequence[str]] = lambda: (),
        on_met: Callable[[int, str], None] = lambda node, name: None,
        met: Mapping[int, str] | None = None,
    ) -> None:
        self._poll_s, self._uploaders = poll_s, uploaders
        self._on_trouble, self._on_met = on_trouble, on_met
        self._met = dict(met or {})
        self._names: dict[int, str] = {}
        self._retry_at: dict[int, float] = {}
        self._mail: Mail | None = None
        self.troubles: dict[str, str] = {}

    def refresh(self, grid: Grid) -> None:
        """Forget nodes that left, ask new ones for their name, and hear who has said it.

        A name belongs to one node at a time; whoever is refused is asked again later, since the
        node that holds the name may be the one that is about to leave.
        """
        if self._mail is None:
            self._mail = Mail(grid, self._poll_s)
        present, now = set(grid.get_node_ids()), time.monotonic()
        asked = {node for node, _ in self._mail.owed()}
        left = {node: self._names[node] for node in self._names.keys() - present if node >= 0}
        if left:
            # Its name is free: who was refused for it need not wait.
            self._retry_at = {node: at for node, at in self._retry_at.items() if node in asked}
        # Back again it may be at work, and would say its name only after that.
        self._met |= left
        self._names = {node: name for node, name in self._names.items() if node in present}
        for node in sorted(present & self._met.keys() - self._names.keys()):
            if self._met[node] not in self._names.values():
                self._names[node] = self._met[node]
        new = [
            node
            for node in sorted(present - self._names.keys() - asked)
            if self._retry_at.get(node, 0.0) <= now
        ]
        orders = [
            Message(RecordDict(), node, MessageType.QUERY, ttl=MEET_S + 60, group_id=f"meet-{node}")
            for node in new
        ]
        self._retry_at |= dict.fromkeys(new, now + MEET_S)
        lost = self._mail.send(orders)
        # A node takes as long as its machine is busy: nobody waits for it who has enough others.
        overdue = Closed("deadline", f"no reply within {MEET_S:g} s")
        for reply in [*lost, *self._mail.arrived()]:
            self._meet(reply)
        late = {f"meet-{node}" for node, at_s in self._retry_at.items() if at_s <= now}
        for reply in self._mail.give_up(overdue, late.__contains__):
            self._meet(reply)
        # Who has a node as well is asked there.
        met = set(self._names.values())
        uploaders = [name for name in self._uploaders() if name not in met]
        self._names |= {-number: name for number, name in enumerate(uploaders, start=1)}

    def doubt(self, node: int) -> None:
        """Ask a node for its name again: it may have changed it since it was met."""
        if self._met.pop(node, None) is not None:
            self._names.pop(node, None)

    def wait_for(
        self,
        grid: Grid,
        count: int,
        timeout_s: float,
        held: Set[str] = frozenset(),
        heed: Callable[[], None] = lambda: None,
    ) -> None:
        """Refresh until enough nodes are there.

        Args:
            grid: Flower's connection to the nodes.
            count: How many.
            timeout_s: How long to wait for them.
            held: Clients that count, also where they are gone.
            heed: Called between two looks; may raise.

        Raises:
            RuntimeError: They did not come in time; says what kept those out that tried.
        """
        end = time.monotonic() + timeout_s
        while True:
            self.refresh(grid)
            heed()
            if len({*held, *self._names.values()}) >= count:
                return
            if time.monotonic() >= end:
                why = "".join(f"; node {node}: {text}" for node, text in self.troubles.items())
                raise RuntimeError(
                    f"{len(self._names)} of {count} clients joined within {timeout_s:g} s; "
                    f"start the missing nodes or lower 'clients' and 'quorum'{one_line(why)}"
                )
            time.sleep(max(self._poll_s, 0.1))

    def nodes(self) -> dict[int, str]:
        """Every known node and its name, in the order of names."""
        return dict(sorted(self._names.items(), key=lambda pair: pair[1]))

    def sample(self, count: int, seed: str) -> dict[int, str]:
        """So many of the known nodes, drawn by name; at most all."""
        known = list(self.nodes().items())
        chosen = random.Random(seed).sample(range(len(known)), min(count, len(known)))
        return dict(known[index] for index in sorted(chosen))

    def _meet(self, reply: Reply) -> None:
        node, record = reply.node, None
        if reply.message is not None:
            record = reply.message.content.config_records.get(CLIENT_KEY)
        name = record.get(CLIENT_KEY) if record is not None else None
        if reply.message is None:
            trouble = reply.reason
        elif not isinstance(name, str) or not NAME.fullmatch(name):
            trouble = f"{one_line(str(name)[:100])!r} is no name: 1 to 100 of A-Z a-z 0-9 _ . @ : -"
        elif name in self._names.values():
            trouble = f"the name {name!r} is taken; set client='…' in each node's configuration"
        else:
            self._names[node] = name
            self._on_met(node, name)
            self.troubles.pop(str(node), None)
            return
        self._retry_at[node] = time.monotonic() + MEET_S
        self.troubles[str(node)] = trouble
        self._on_trouble(str(node), trouble)
