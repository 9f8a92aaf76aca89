"""The rival's ServerApp: it asks every node once, takes every reply, and keeps none."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

LOOK_S = 0.2
"""Seconds between two looks for replies; Flower's own strategies look every 3."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask, and write down when the last reply was here."""
    clients = int(str(context.run_config["clients"]))
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(LOOK_S)
    asked = grid.push_messages(
        [
            Message(RecordDict({"config": ConfigRecord({"round": 1})}), node, "train")
            for node in nodes
        ]
    )
    waiting, took_bytes, lost = set(asked), 0, 0
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                lost += 1
            else:
                took_bytes += len(reply.content.array_records["update"]["update"].data)
        time.sleep(LOOK_S)
    told = {"ended": time.time(), "bytes": took_bytes, "lost": lost}
    Path(str(context.run_config["told"])).write_text(json.dumps(told))
