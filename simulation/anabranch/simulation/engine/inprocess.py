"""Run a federation in one process: the same ServerApp and ClientApp, no server, no copies.

The base is loaded once (``anabranch.client.session``) and adapters are swapped into it. Clients of
a task that allows it train side by side, each in a thread with an adapter of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from anabranch.simulation.engine.identity import (
    RUN_ID,
    SERVER_NODE_ID,
    name_message,
    server_identity,
)
from anabranch.simulation.engine.threads import ClientThreads
from anabranch.wire.plan import Scalar

CLIENT_FAILED = 2
"""Flower's own code for a ClientApp that raised."""


class InProcessGrid(Grid):
    """A Grid whose nodes are contexts in this process.

    Args:
        client_app: Called for every message.
        contexts: One per node, by node number; their ``state`` lives as long as the grid.
        on_reply: Called after each client with the message type and the node's number.
        threads: Where clients run; None runs each when its reply is pulled.
    """

    def __init__(
        self,
        client_app: ClientApp,
        contexts: dict[int, Context],
        on_reply: Callable[[str, int], None] = lambda kind, node: None,
        threads: ClientThreads | None = None,
    ) -> None:
        self._client_app = client_app
        self._contexts = contexts
        self._on_reply = on_reply
        self._threads = threads or ClientThreads(1)
        self._replies: dict[str, tuple[Message, Callable[[], Message]]] = {}
        self._count = 0

    def get_node_ids(self) -> Iterable[int]:
        """Every node, in order."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for their clients."""
        identifiers = []
        for message in messages:
            self._count += 1
            identifier = f"message-{self._count}"
            name_message(message, identifier)
            self._replies[identifier] = message, self._threads.begin(partial(self._call, message))
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, once their clients are done."""
        replies = []
        for identifier in message_ids:
            if identifier in self._replies:
                message, reply = self._replies.pop(identifier)
                replies.append(reply())
                self._on_reply(message.metadata.message_type, message.metadata.dst_node_id)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run every client in order; nothing is waited for, so the timeout has no use."""
        return self.pull_messages(self.push_messages(messages))

    def _call(self, message: Message) -> Message:
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        # As Flower's own client process does: whatever an app raises becomes its reply.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(CLIENT_FAILED, reason), reply_to=message)

    def set_run(self, run: Run) -> NoReturn:
        """Not part of an in-process run."""
        raise RuntimeError("an in-process grid belongs to one run")

    @property
    def run(self) -> NoReturn:
        """Not part of an in-process run."""
        raise RuntimeError("an in-process grid has no Flower run record")

    def create_message(self, *args: object, **kwargs: object) -> NoReturn:
        """Deprecated by Flower."""
        raise RuntimeError("use flwr.app.Message")


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    folder: Path,
    clients: int,
    run_config: dict[str, Scalar],
    on_reply: Callable[[str, int], None] = lambda kind, partition: None,
    side_by_side: int = 1,
    keys: Path | None = None,
) -> None:
    """Run a prepared federation folder to its end.

    Args:
        server_app: The coordinator's app.
        client_app: The clients' app.
        folder: Federation folder (``federation.toml`` and ``start/``).
        clients: Number of clients; client i holds partition i.
        run_config: What a Flower run configuration would hold for both apps.
        on_reply: Called after each client with the message type and its partition.
        side_by_side: How many clients train at once.
        keys: Folder of every client's keys; None where nobody signs.
    """
    config = {**run_config, "federation": str(folder)}
    first = SERVER_NODE_ID + 1
    node: dict[str, Scalar] = {"num-partitions": clients}
    if keys is not None:
        node["keys"] = str(keys)
    contexts = {
        first + partition: Context(
            run_id=RUN_ID,
            node_id=first + partition,
            node_config={"partition-id": partition, **node},
            state=RecordDict(),
            run_config=config,
        )
        for partition in range(clients)
    }
    server = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), config)
    with server_identity(), ClientThreads(side_by_side) as threads:
        grid = InProcessGrid(
            client_app, contexts, lambda kind, node: on_reply(kind, node - first), threads
        )
        server_app(grid, server)
