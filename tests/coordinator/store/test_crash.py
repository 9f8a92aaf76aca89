"""A coordinator killed at any moment: what returned is there, and nothing twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from anabranch.coordinator.store import Store

# Goes on from what the store holds, as a coordinator does, and says what returned.
WRITER = """
import sys
from pathlib import Path
from anabranch.coordinator.store import Contribution, Publication, StoreConfig, open_store

store = open_store(
    StoreConfig(url=sys.argv[1], keep_rounds=None if sys.argv[1] == "journal" else 3),
    Path(sys.argv[2]), federation="f", run="r", durable=False,
)
print("up", flush=True)
latest = store.latest()
number = latest.round + 1 if latest else 1
while True:
    for client in [f"client-{number}-{index}" for index in range(4)]:
        digest = store.put(client.encode() * 50)
        counted = store.admit(
            Contribution(round=number, client=client, digest=digest, size_bytes=50 * len(client))
        )
        print("admitted" if counted else "again", number, client, flush=True)
    digest = store.put(b"adapter %d" % number)
    store.publish(
        Publication(round=number, digest=digest, adapter_hash=str(number)),
        {"round": number, "admitted": len(store.contributions(number))},
    )
    print("published", number, flush=True)
    store.tidy()
    number += 1
"""
KILLS = 12


def test_killed_at_any_moment_nothing_is_lost_or_counted_twice(
    open_again: partial[Store], tmp_path: Path
) -> None:
    url = str(open_again.args[0])
    draw = random.Random(7)
    said: list[str] = []
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(draw.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read()
        said += lines[: lines.rfind("\n") + 1].splitlines()
        process.stdout.close()
        process.wait()
    store = open_again()
    admitted = [tuple(line.split()[1:]) for line in said if line.startswith("admitted")]
    held = Counter((str(row.round), row.client) for row in store.contributions())
    assert len(admitted) > KILLS
    assert set(admitted) <= set(held)
    assert set(held.values()) == {1}
    assert max(Counter(admitted).values()) == 1
    # Every round that is over was whole, was published once, and says so.
    rounds = [row.round for row in store.publications()]
    assert rounds == list(range(1, len(rounds) + 1))
    assert [int(line.split()[1]) for line in said if line.startswith("published")] == sorted(
        int(line.split()[1]) for line in set(said) if line.startswith("published")
    )
    assert [row["round"] for row in store.notes("round")] == rounds
    assert all(row["admitted"] == 4 for row in store.notes("round"))
    # The bytes of what retention keeps are there, whole.
    for row in (*store.contributions(), *store.publications()):
        if row.round > len(rounds) - 3:
            assert store.get(row.digest)
