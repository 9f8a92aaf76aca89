"""What an upload holds in memory while its bytes come."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tracemalloc
from pathlib import Path
from typing import Any, cast

from anabranch.coordinator.api.config import LimitsConfig
from anabranch.coordinator.api.quotas import Quotas
from anabranch.coordinator.api.spool import Spool, Wanted
from anabranch.coordinator.api.uploads import Uploads
from anabranch.wire.v1 import coordinator_pb2 as pb

PART_BYTES, PARTS = 1 << 20, 4


class Stream:
    """A call's side that brings parts, and looks at what is held of the one before."""

    def __init__(self) -> None:
        self.sent: list[pb.UploadPart] = []
        self.references: list[int] = []
        self.held_bytes: list[int] = []

    def _held(self) -> int:
        return tracemalloc.get_traced_memory()[0] - (self.held_bytes or [0])[0]

    async def read(self) -> pb.UploadPart:
        # The thread that wrote it lets go a moment later.
        for _ in range(100):
            if self._held() < PART_BYTES / 2:
                break
            await asyncio.sleep(0.02)
        if self.sent:
            self.references.append(sys.getrefcount(self.sent[-1]))
        self.held_bytes.append(self._held())
        # Its bytes are protobuf's own, which nobody traces; a copy of them is traced.
        self.sent.append(pb.UploadPart(data=bytes([len(self.sent)]) * PART_BYTES))
        return self.sent[-1]


def test_a_part_that_is_on_the_disk_is_held_no_longer(tmp_path: Path) -> None:
    whole = b"".join(bytes([number]) * PART_BYTES for number in range(PARTS))
    wanted = Wanted("f", "a", 1, hashlib.sha256(whole).hexdigest(), len(whole))
    spool, limits, stream = Spool(tmp_path), LimitsConfig(), Stream()

    async def take() -> Any:
        uploads = Uploads(cast(Any, None), spool, Quotas(1, 1), limits)
        return await uploads._take(wanted, 0, stream)

    tracemalloc.start()
    try:
        arrival = asyncio.run(take())
    finally:
        tracemalloc.stop()
    assert arrival.holds(wanted)
    lone: list[object] = [object()]
    assert stream.references == [sys.getrefcount(lone[-1])] * (PARTS - 1)
    assert max(stream.held_bytes[1:]) < PART_BYTES / 2
