"""1,000 clients of the coordinator's API in one process: `python -m benchmarks.load.clients SPEC`.

Every client has a certificate, a connection and a signing key of its own, and has asked for its
order before the clock starts. It prints a line when all have, waits for one, uploads, and prints
what came of it as JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from anabranch.wire.v1 import coordinator_pb2 as pb
from benchmarks.load.updates import NAME, Updates, client_name, read_updates

PART_BYTES = 1 << 20
SERVICE = "/anabranch.wire.v1.Uploads"


class Client:
    """One client.

    Args:
        number: Which.
        address: Of the API.
        credentials: What it shows.
    """

    def __init__(self, number: int, address: str, credentials: grpc.ChannelCredentials) -> None:
        self.number = number
        # One connection each, as clients on machines of their own have.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.secure_channel(address, credentials, options)
        self._order = self.channel.unary_unary(
            f"{SERVICE}/Order", pb.OrderRequest.SerializeToString, pb.OrderReply.FromString
        )
        self._upload = self.channel.stream_unary(f"{SERVICE}/Upload")

    async def order(self) -> str:
        """What the round under way asks of it, a plan's JSON."""
        return str((await self._order(pb.OrderRequest(federation=NAME))).plan)

    async def upload(self, updates: Updates, parts: list[bytes]) -> float:
        """Send its update; seconds until it was admitted."""
        header = updates.header(self.number)
        digest = hashlib.sha256(header)
        digest.update(updates.payload)
        first = pb.UploadHeader(
            federation=NAME, round=updates.manifest.meta.round,
            size_bytes=len(header) + len(updates.payload), digest=digest.hexdigest(),
        )  # fmt: skip
        own = [
            pb.UploadPart(header=first).SerializeToString(),
            pb.UploadPart(data=header).SerializeToString(),
        ]
        began = time.perf_counter()
        reply = pb.UploadReply.FromString(await self._upload(iter([*own, *parts])))
        took_s = time.perf_counter() - began
        assert reply.digest == digest.hexdigest()
        return took_s


async def run(spec: dict[str, Any]) -> None:
    """Connect all, wait for the word, upload."""
    folder = Path(spec["peers"])
    ca = (folder / "ca.pem").read_bytes()
    clients = []
    for number in range(spec["clients"]):
        key, certificate = (
            (folder / f"{client_name(number)}.{kind}").read_bytes() for kind in ("key", "pem")
        )
        shown = grpc.ssl_channel_credentials(ca, key, certificate)
        clients.append(Client(number, spec["address"], shown))
    gate = asyncio.Semaphore(32)

    updates = read_updates(Path(spec["update"]))

    async def connect(client: Client) -> None:
        async with gate:
            plan = json.loads(await client.order())
            assert plan["start_hash"] == updates.manifest.meta.start_hash

    await asyncio.gather(*map(connect, clients))
    parts = [
        pb.UploadPart(data=updates.payload[start : start + PART_BYTES]).SerializeToString()
        for start in range(0, len(updates.payload), PART_BYTES)
    ]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    at_once = asyncio.Semaphore(spec["at_once"])

    async def send(client: Client) -> float:
        async with at_once:
            return await client.upload(updates, parts)

    began = time.time()
    took_s = await asyncio.gather(*map(send, clients))
    ended = time.time()
    size_bytes = len(updates.header(0)) + len(updates.payload)
    print(
        json.dumps({"began": began, "ended": ended, "took_s": took_s, "size_bytes": size_bytes}),
        flush=True,
    )
    for client in clients:
        await client.channel.close()


if __name__ == "__main__":
    asyncio.run(run(json.loads(Path(sys.argv[1]).read_text())))
