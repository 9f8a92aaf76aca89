"""A coordinator killed at any moment: what returned is there, and nothing twice."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from anabranch.coordinator.store import Store
from anabranch.wire.receipt import check_chain

# Its children go on from what the store holds, as a coordinator does, and say what returned. Forked
# and killed here, so that Python and what it loads start once.
WRITER = """
import os, random, signal, sys, time
from pathlib import Path
from anabranch.coordinator.store import Contribution, Publication, StoreConfig, open_store
import anabranch.coordinator.store.sql
from anabranch.wire.receipt import Receipt, encode_receipt, receipt_hash

url, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])


def say(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())


def work(up):
    config = StoreConfig(url=url, keep_rounds=None if url == "journal" else 3)
    store = open_store(config, folder, federation="f", run="r", durable=False)
    latest = store.latest()
    number = latest.round + 1 if latest else 1
    os.write(up, b"up")
    while True:
        for client in [f"client-{number}-{index}" for index in range(4)]:
            data = client.encode() * 50
            row = Contribution(
                round=number, client=client, digest=store.put(data), size_bytes=len(data)
            )
            say("admitted" if store.admit(row) else "again", number, client)
        digest = store.put(b"adapter %d" % number)
        last = store.last_receipt()
        receipt = Receipt(
            kind="merge", federation="f", run="r", round=number, time_s=1.0, software="",
            previous=receipt_hash(last) if last else None, base_hash="0" * 64, start_hash="0" * 64,
        )
        store.publish(
            Publication(round=number, digest=digest, adapter_hash=str(number)),
            {"round": number, "admitted": len(store.contributions(number))},
            [encode_receipt(receipt, None)],
        )
        say("published", number)
        store.tidy()
        number += 1


draw = random.Random(7)
for _ in range(kills):
    ready, up = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        work(up)
    os.read(ready, 2)
    # A machine that has others to serve takes longer for all of it.
    slow = min(0.5, 3 * (time.monotonic() - began))
    time.sleep(draw.uniform(0.0, max(0.06, slow)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(up)
"""
KILLS = 40


def test_killed_at_any_moment_nothing_is_lost_or_counted_twice(
    open_again: partial[Store], tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", WRITER, open_again.args[0], str(tmp_path), str(KILLS)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    said = run.stdout.splitlines()
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
    assert [row.round for row in check_chain(store.receipts(), None)] == rounds
    # The bytes of what retention keeps are there, whole.
    for row in (*store.contributions(), *store.publications()):
        if row.round > len(rounds) - 3:
            assert store.get(row.digest)
