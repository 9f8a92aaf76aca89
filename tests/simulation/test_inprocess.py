from __future__ import annotations

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from anabranch.simulation.engine.identity import server_identity
from anabranch.simulation.engine.inprocess import CLIENT_FAILED, InProcessGrid


def grid() -> InProcessGrid:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        context.state["count"] = message.content.config_records.get("x")  # raises on None
        return Message(RecordDict(), reply_to=message)

    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in (5, 3)}
    return InProcessGrid(app, contexts)


def test_nodes_are_ordered_and_a_raising_app_becomes_an_error_reply() -> None:
    nodes = grid()
    assert list(nodes.get_node_ids()) == [3, 5]
    with server_identity():
        orders = [Message(RecordDict(), node, MessageType.QUERY) for node in (3, 5)]
        got = list(nodes.send_and_receive(orders))
    assert [message.error.code for message in got] == [CLIENT_FAILED, CLIENT_FAILED]
    assert "TypeError" in (got[0].error.reason or "")
    assert [message.metadata.src_node_id for message in got] == [3, 5]


def test_what_an_in_process_grid_lacks_says_so() -> None:
    nodes = grid()
    with pytest.raises(RuntimeError, match="one run"):
        nodes.set_run(None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no Flower run"):
        _ = nodes.run
    with pytest.raises(RuntimeError, match=r"flwr\.app\.Message"):
        nodes.create_message()


def test_the_identity_is_put_back() -> None:
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    with server_identity():
        assert TaskIdentity.run_id == 1
    assert (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id) == before
