"""1,000 SuperNodes in one process, of Flower's own classes; its argument is a file.

Each has a key, a connection and a node id of its own, and has taken its message before the clock
starts. It prints a line when all have, waits for one, sends the replies, and prints what came of it
as JSON. What a SuperNode does beside that (it starts a process per message) is left out.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MAX_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from anabranch.wire.plan import UPDATE_STYPE
from benchmarks.load.updates import Updates, read_updates

PATIENCE_S = 600.0
"""Seconds a call may take."""


class SuperNode:
    """A node.

    Args:
        number: Which.
        address: Of the SuperLink.
        trusted: Of its certificate.
    """

    def __init__(self, number: int, address: str, trusted: ssl.SSLContext) -> None:
        self.number = number
        private, public = generate_key_pairs()
        self._fleet = FleetHttpClient(
            f"https://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, public),
            ],
            verify=trusted,
            timeout=PATIENCE_S,
        )
        key = public_key_to_bytes(public)
        self._fleet.RegisterNode(RegisterNodeFleetRequest(public_key=key))
        # Its heart beats once for all.
        active = self._fleet.ActivateNode(
            ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_MAX_INTERVAL)
        )
        self._node = Node(node_id=active.node_id)
        self._retry = make_simple_http_retry_invoker()
        self._asked: Message | None = None

    def take(self) -> None:
        """Wait for its message and take it."""
        while not (
            got := self._fleet.PullMessages(PullMessagesRequest(node=self._node))
        ).messages_list:
            time.sleep(0.5)
        message, tree = message_from_proto(got.messages_list[0]), got.message_object_trees[0]
        run, about = message.metadata.run_id, message.metadata
        pull = make_pull_object_fn_protobuf(self._fleet.PullObject, self._node, run)
        contents = pull_objects([one.object_id for one in iterate_object_tree(tree)], pull)
        self._fleet.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=run, message_object_id=about.message_id
            )
        )
        message = cast(Message, inflate_object_from_contents(about.message_id, contents))
        message.metadata.__dict__["_message_id"] = about.message_id
        self._asked = message

    def reply(self, updates: Updates) -> float:
        """Send its update; seconds until the SuperLink had all of it."""
        assert self._asked is not None
        data = updates.header(self.number) + updates.payload
        array = Array(dtype="uint8", shape=(len(data),), stype=UPDATE_STYPE, data=data)
        content = RecordDict({"update": ArrayRecord({"update": array})})
        message = Message(content, reply_to=self._asked)
        run = message.metadata.run_id
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects, tree = get_all_nested_objects(message), get_object_tree(message)
            bodies = {name: one.deflate() for name, one in objects.items()}
        began = time.perf_counter()
        pushed = self._retry.invoke(
            self._fleet.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            ),
        )
        for name in pushed.objects_to_push:
            kept = self._retry.invoke(
                self._fleet.PushObject,
                PushObjectRequest(
                    node=self._node, run_id=run, object_id=name, object_content=bodies[name],
                    session_id=pushed.session_id,
                ),
            )  # fmt: skip
            assert kept.stored
        return time.perf_counter() - began


def run(spec: dict[str, Any]) -> None:
    """Register all, wait for the word, reply."""
    trusted = ssl.create_default_context(cafile=spec["ca"])
    updates = read_updates(Path(spec["update"]))
    with ThreadPoolExecutor(16) as some:
        nodes = list(
            some.map(
                lambda number: SuperNode(number, spec["address"], trusted), range(spec["clients"])
            )
        )
        list(some.map(SuperNode.take, nodes))
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(spec["at_once"]) as all_of_them:
        began = time.time()
        took_s = list(all_of_them.map(lambda node: node.reply(updates), nodes))
        ended = time.time()
    size_bytes = len(updates.header(0)) + len(updates.payload)
    told = {"began": began, "ended": ended, "took_s": took_s, "size_bytes": size_bytes}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
