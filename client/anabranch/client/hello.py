"""The answer to who a node is. Loads no torch."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict

from anabranch.client.site import site_of
from anabranch.wire.plan import CLIENT_KEY


def hello(message: Message, context: Context) -> Message:
    """Say who this client is."""
    name = site_of(context.node_config).name
    content = RecordDict({CLIENT_KEY: ConfigRecord({CLIENT_KEY: name})})
    return Message(content, reply_to=message)
