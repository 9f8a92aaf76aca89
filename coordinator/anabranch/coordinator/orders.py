"""A round's orders: who is asked, from which start, and what of the adapter each must be sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Message, MessageType

from anabranch.aggregation import MergeMethod
from anabranch.coordinator.admission import RefusedError
from anabranch.coordinator.collect import Reply
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.start import Start, at_rank


class Orders:
    """What the clients are handed, and which adapter each node is known to hold.

    Args:
        config: The federation.
        method: How its cohorts are merged.

    Attributes:
        asked: Nodes of the orders last made, and their clients.
        bytes_down: Bytes of adapters in them.
    """

    def __init__(self, config: FederationConfig, method: MergeMethod) -> None:
        self._config, self._method = config, method
        self._starts: dict[int | None, Start] = {}  # by rank
        self._own: Mapping[str, Start] = {}  # by client, where not even rank decides
        self._held: dict[int, str] = {}  # hash of the adapter, by node
        self.asked: Mapping[int, str] = {}
        self.bytes_down = 0

    @property
    def whole(self) -> Start:
        """The start of the clients that train all ranks."""
        return self._starts[None]

    def begin(self, whole: Start) -> None:
        """Begin a round with what it hands the clients of full rank."""
        self._starts, self._own = {None: whole}, {}

    def part(self, own: Mapping[str, Start]) -> None:
        """Give clients starts of their own for this round: those of their group."""
        self._own = own

    def start(self, client: str) -> Start:
        """What a client is handed."""
        if client in self._own:
            return self._own[client]
        rank = self._config.ranks.get(client)
        if rank not in self._starts:
            assert rank is not None
            self._starts[rank] = at_rank(self.whole, rank, self._method, self._config.down)
        return self._starts[rank]

    def train(self, asked: Mapping[int, str]) -> list[Message]:
        """Orders for the clients of these nodes to train in the round begun."""
        return self._messages(asked, self.start, MessageType.TRAIN)

    def evaluate(self, asked: Mapping[int, str], whole: Start) -> list[Message]:
        """Orders for the clients of these nodes to score an adapter."""
        return self._messages(asked, lambda _: whole, MessageType.EVALUATE)

    def learn(self, reply: Reply, served: str) -> None:
        """A node that answered holds the adapter its order was about; one that failed may not.

        Args:
            reply: The answer.
            served: Hash of the adapter in service.
        """
        self._held.pop(reply.node, None)
        if self._config.down_codec is not None and reply.message is not None:
            self._held[reply.node] = served

    def client(self, node: int) -> str:
        """Who a reply of this node is from.

        Raises:
            RefusedError: It was not asked.
        """
        if node not in self.asked:
            raise RefusedError("unasked", f"node {node} was not asked in this round")
        return self.asked[node]

    def _messages(
        self, asked: Mapping[int, str], start_of: Callable[[str], Start], kind: str
    ) -> list[Message]:
        # Waiting for a reply ends with the deadline; its message may live a little longer.
        ttl = self._config.deadline_s + 60
        self.asked, self.bytes_down, orders = asked, 0, []
        for node, client in asked.items():
            start = start_of(client)
            sent = start.sent(self._held.get(node))
            self.bytes_down += len(sent or b"")
            group = str(start.plan.round)
            orders.append(Message(start.content(sent), node, kind, ttl=ttl, group_id=group))
        return orders
