"""The one place that touches what Flower keeps private.

``flwr.app.Message`` reads run, node and task number from a process-wide identity that Flower sets
in the processes it starts itself. An engine that calls the apps in its own process sets it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

RUN_ID, SERVER_NODE_ID, TASK_ID = 1, 1, 1
"""What an in-process run calls itself; client nodes count from 2."""


@contextmanager
def server_identity() -> Iterator[None]:
    """Be the ServerApp's task while the block runs."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
        RUN_ID,
        SERVER_NODE_ID,
        TASK_ID,
    )
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


def name_message(message: Message, identifier: str) -> None:
    """Give a message the identifier that a SuperLink would."""
    message.metadata.__dict__["_message_id"] = identifier
