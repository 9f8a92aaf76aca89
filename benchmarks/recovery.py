"""From kill -9 to collecting again: ``python -m benchmarks.recovery --kills 20``.

A deployed federation on loopback (``benchmarks.loopback``): ``coordinator up`` with TLS, SuperNodes
with registered keys, clients that send updates of noise. In each round one process is killed at a
seeded moment: the SuperLink, the ServerApp, ``up`` itself (started again at once, as systemd does),
or a node. Printed for each kill: seconds until the coordinator collects again, and what of that is
Flower's own: the start of its SuperLink and ``flwr run``. How long Flower then takes to start the
ServerApp is not counted as its own, for that begins in a process that was there before
(``--no-standby``: in a fresh one).
Afterwards every update must be counted once, by rows and receipts, and no artifact be left over.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from anabranch.coordinator.store import Store
from anabranch.coordinator.store.opening import artifacts_of
from anabranch.coordinator.store.retention import sweep
from anabranch.wire.receipt import check_chain
from benchmarks.loopback import Loopback

RESULTS = Path(__file__).with_name("results") / "recovery.json"
SILENT_S = 60.0
"""Longest time without a line of what it waits for."""


@dataclass(frozen=True)
class Recovery:
    """What one kill came to.

    Attributes:
        fault: Who was killed.
        round: The round that was under way.
        seconds: From the kill until a round collects again.
        flower_s: How much of that Flower takes to start what it is asked for.
    """

    fault: str
    round: int
    seconds: float
    flower_s: float

    @property
    def beyond_s(self) -> float:
        """What is beyond Flower's own restart."""
        return max(0.0, self.seconds - self.flower_s)


def campaign(
    loop: Loopback, faults: Sequence[str], seed: int, patience_s: float = 300.0
) -> list[Recovery]:
    """Run a federation to its end, with one kill in each of its first rounds.

    Args:
        loop: A fresh one, with more rounds than faults.
        faults: Who is killed, one after the other.
        seed: Of the moments.
        patience_s: Longest wait for anything.

    Raises:
        RuntimeError: Something does not come.
        ValueError: It ended, and not as it should.
    """
    draw, found = random.Random(seed), []
    store = loop.store()
    try:
        loop.start()
        # Flower's node ends where its key is not registered yet.
        loop.wait(
            lambda: any(row["event"] == "submitted" for row in loop.changes()), patience_s, "a run"
        )
        for index in range(loop.nodes):
            loop.start_node(index)
        for number, fault in enumerate(faults, start=1):
            loop.wait(lambda now=number: collects(store, now), patience_s, f"round {number}")  # type: ignore[misc]
            time.sleep(draw.uniform(0.0, 2.0))
            found.append(_kill(loop, store, fault, number, draw, patience_s))
        assert loop.up is not None
        loop.wait(lambda: loop.pid("up") is None, patience_s, "the end")
        if loop.up.returncode:
            raise ValueError(f"up ended with {loop.up.returncode}\n{loop.logs()}")
        check(loop, store)
    finally:
        store.close()
        loop.close()
    return found


def collects(store: Store, number: int) -> bool:
    """Whether a round has begun to collect, or is over."""
    rows = [row for row in store.notes("state") if row["round"] >= number]
    return bool(rows) or any(row["round"] >= number for row in store.notes("round"))


def _kill(
    loop: Loopback, store: Store, fault: str, number: int, draw: random.Random, patience_s: float
) -> Recovery:
    """Kill, and wait until a round collects again."""
    if fault == "node":
        index = draw.randrange(loop.nodes)
        loop.kill_node(index)
        began = time.monotonic()
        loop.start_node(index)
        loop.wait(lambda: over(store, number), patience_s, f"the end of round {number}")
        return Recovery(fault, number, round(time.monotonic() - began, 2), 0.0)
    loop.wait(lambda: loop.kill(fault), patience_s, f"a {fault} to kill")
    before, told = len(store.notes("begun")), len(loop.changes())
    planned = len(store.notes("planned"))
    began = time.monotonic()
    if fault == "up":
        loop.start()
    loop.wait(lambda: len(store.notes("begun")) > before, patience_s, "a new run")
    loop.wait(lambda: works(store, planned), patience_s, "collecting again")
    seconds = time.monotonic() - began
    changes = loop.changes()[told:]
    own = sum(row["seconds"] for row in changes if row["event"] in ("superlink", "submitted"))
    return Recovery(fault, number, round(seconds, 2), round(own, 2))


def over(store: Store, number: int) -> bool:
    """Whether a round is over."""
    return any(row["round"] == number for row in store.notes("round"))


def works(store: Store, planned: int) -> bool:
    """Whether a round was planned since there were so many plans, or nothing is left to plan."""
    return len(store.notes("planned")) > planned or bool(store.notes("ended"))


def _unix(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def check(loop: Loopback, store: Store, rounds: int | None = None) -> None:
    """See that nothing is lost, counted twice, left over, or was waited for in silence.

    Args:
        loop: A federation that has ended.
        store: Its store.
        rounds: How many had to end; None: all.

    Raises:
        ValueError: Something is.
    """
    rows = Counter((row.round, row.client) for row in store.contributions())
    receipts = check_chain(store.receipts(), None)
    counted = Counter((one.round, one.client) for receipt in receipts for one in receipt.inputs)
    if counted != rows or set(rows.values()) != {1}:
        raise ValueError(f"rows {sorted(rows)} and receipts {sorted(counted)} differ")
    ends = [row["round"] for row in store.notes("round")]
    if ends != list(range(1, (rounds or loop.config.rounds) + 1)):
        raise ValueError(f"rounds ended as {ends}")
    kept = artifacts_of(loop.config.store, loop.federation, durable=False)
    sweep(store.engine, kept, grace_s=0.0)  # type: ignore[attr-defined]
    named = {row.digest for row in store.contributions()}
    named |= {row.digest for row in store.publications()}
    if {name for name, _ in kept.names()} != named:
        raise ValueError("artifacts are left that nothing names, or some are missing")
    changes = loop.changes()
    for before, after in pairwise(changes):
        gap_s = _unix(after["time"]) - _unix(before["time"])
        if gap_s > SILENT_S and after["event"] not in ("superlink", "cleared", "submitted"):
            raise ValueError(f"{gap_s:.0f} s in silence before {after['message']!r}")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="serverapp,superlink,up", help="in turn; or node")
    parser.add_argument("--insecure", action="store_true", help="no TLS and no node keys")
    parser.add_argument("--no-standby", action="store_true", help="each ServerApp loads anew")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    kinds = given.faults.split(",")
    faults = [kinds[index % len(kinds)] for index in range(given.kills)]
    with tempfile.TemporaryDirectory() as folder:
        loop = Loopback(
            Path(folder), given.nodes, tls=not given.insecure,
            standby=not given.no_standby, rounds=given.kills + 1,
            quorum=max(1, given.nodes - 1), deadline_s=60,
        )  # fmt: skip
        found = campaign(loop, faults, given.seed)
    for one in found:
        print(
            f"round {one.round:3}  {one.fault:10} {one.seconds:6.1f} s, Flower's own "
            f"{one.flower_s:5.1f} s, beyond {one.beyond_s:5.1f} s"
        )
    rows = []
    for kind in kinds:
        mine = [one for one in found if one.fault == kind]
        if mine:
            rows.append(
                {
                    "fault": kind,
                    "kills": len(mine),
                    "median_s": round(statistics.median(one.seconds for one in mine), 2),
                    "median_beyond_s": round(statistics.median(one.beyond_s for one in mine), 2),
                    "longest_beyond_s": round(max(one.beyond_s for one in mine), 2),
                }
            )
            print(json.dumps(rows[-1]))
    if found:
        median = statistics.median(one.beyond_s for one in found if one.fault != "node")
        print(f"median beyond Flower's own restart: {median:.1f} s of at most 10 s")
    given.out.write_text(
        json.dumps({"kills": [asdict(one) for one in found], "faults": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
