"""A round's orders: who is asked, from which start, and what of the adapter each must be sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType

from anabranch.aggregation import MergeMethod
from anabranch.coordinator.collect import Reply
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.start import Start, at_rank


@dataclass
class _Asked:
    """Starts by rank, starts of a client's own where not even rank decides, and clients by node."""

    starts: dict[int | None, Start]
    own: Mapping[str, Start] = field(default_factory=dict)
    clients: Mapping[int, str] = field(default_factory=dict)


class Orders:
    """What the clients are handed, and which adapter each node is known to hold.

    Args:
        config: The federation.
        method: How its cohorts are merged.

    Attributes:
        bytes_down: Bytes of adapters in the orders last made.
    """

    def __init__(self, config: FederationConfig, method: MergeMethod) -> None:
        self._config, self._method = config, method
        self._rounds: dict[int, _Asked] = {}
        self._now = 0
        self._scoring: Mapping[int, str] = {}
        self._held: dict[int, str] = {}  # hash of the adapter, by node
        self.bytes_down = 0

    @property
    def whole(self) -> Start:
        """The start of the clients that train all ranks in the round under way."""
        return self._rounds[self._now].starts[None]

    def begin(self, whole: Start, late: Collection[int] = ()) -> None:
        """Begin a round with what it hands the clients of full rank.

        Args:
            whole: That.
            late: Earlier rounds that replies may still come for.
        """
        self._now = whole.plan.round
        self._rounds = {number: self._rounds[number] for number in late if number in self._rounds}
        self._rounds[self._now] = _Asked({None: whole})

    def part(self, own: Mapping[str, Start]) -> None:
        """Give clients starts of their own for this round: those of their group."""
        self._rounds[self._now].own = own

    def recall(self, whole: Start) -> None:
        """Take up an earlier round again, with what it handed the clients of full rank."""
        self._rounds[whole.plan.round] = _Asked({None: whole})

    def knows(self, number: int) -> bool:
        """Whether a round's starts are at hand."""
        return number in self._rounds

    def client(self, node: int, number: int) -> str | None:
        """Whom a node was asked as in a round; None if it was not."""
        return self._rounds[number].clients.get(node) if number in self._rounds else None

    def scorer(self, node: int) -> str | None:
        """Whom a node was asked as to score the adapter in service; None if it was not."""
        return self._scoring.get(node)

    def start(self, client: str, number: int) -> Start:
        """What a client is handed in a round."""
        asked, rank = self._rounds[number], self._config.ranks.get(client)
        if client in asked.own:
            return asked.own[client]
        starts = asked.starts
        if rank not in starts:
            assert rank is not None
            starts[rank] = at_rank(starts[None], rank, self._method, self._config.down)
        return starts[rank]

    def train(self, asked: Mapping[int, str]) -> list[Message]:
        """Orders for the clients of these nodes to train in the round begun."""
        self._rounds[self._now].clients = asked
        return self._messages(asked, lambda name: self.start(name, self._now), MessageType.TRAIN)

    def train_again(self, asked: Mapping[int, str]) -> list[Message]:
        """The same for clients whose orders were lost, at the nodes where they are now."""
        before, this_round = self.bytes_down, self._rounds[self._now]
        this_round.clients = {**this_round.clients, **asked}
        orders = self._messages(asked, lambda name: self.start(name, self._now), MessageType.TRAIN)
        self.bytes_down += before
        return orders

    def evaluate(self, asked: Mapping[int, str], whole: Start) -> list[Message]:
        """Orders for the clients of these nodes to score an adapter."""
        self._scoring = asked
        return self._messages(asked, lambda _: whole, MessageType.EVALUATE)

    def learn(self, reply: Reply, start_hash: str) -> None:
        """A node that answered holds the adapter its order was about; one that failed may not.

        Args:
            reply: The answer.
            start_hash: That adapter's.
        """
        self._held.pop(reply.node, None)
        if self._config.down_codec is not None and reply.message is not None:
            self._held[reply.node] = start_hash

    def _messages(
        self, asked: Mapping[int, str], start_of: Callable[[str], Start], kind: str
    ) -> list[Message]:
        # Flower takes no reply to a message that has expired: it lives a little longer than a reply
        # is waited for.
        ttl = self._config.collect.answers_until_s(self._config.deadline_s) + 60
        self.bytes_down, orders = 0, []
        for node, client in asked.items():
            start = start_of(client)
            sent = start.sent(self._held.get(node))
            self.bytes_down += len(sent or b"")
            group = str(start.plan.round)
            orders.append(Message(start.content(sent), node, kind, ttl=ttl, group_id=group))
        return orders
