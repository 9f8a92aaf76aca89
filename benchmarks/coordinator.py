"""The coordinator under load: 1,000 clients upload 2 MB each by gRPC, beside Flower's SuperLink.

Everything runs on this machine: the server, the clients (one process that is all of them), the
rival. Ours: mutual TLS, a signature per update, every update decoded and checked, on the disk and
in the database before its client is told. The rival: TLS, Flower's own node signatures, its state
in memory; what it stores is looked at by nobody. Both are timed from the moment at which all
clients are connected and know what is asked. ``--quick`` is 8 clients of 64 kB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Row, main
from benchmarks.load import flower, material, standing
from benchmarks.load.ours import Load, Outcome, api

CLIENTS, AT_ONCE = 1000, 64
FLOWER = "flwr 1.41 SuperLink"
MOST_MIB, LEAST_RATIO, MOST_MS = 512.0, 3.0, 200.0


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """All rows."""
    if only is None or only in "status p99 ms":
        yield from status(quick)
    if only is None or only not in "status p99 ms":
        yield from uploads(quick)


def status(quick: bool) -> Iterator[Row]:
    """Where federations stand."""
    count, runs = (3, 5) if quick else (standing.FEDERATIONS, 200)
    with tempfile.TemporaryDirectory() as folder:
        found = standing.status_ms(Path(folder), count, runs)
    scenario = f"{count} federations, {count * standing.CLIENTS} clients"
    for note, took_ms in found.items():
        yield Row(
            "status p99 ms", at(took_ms, 0.99), None, "", f"{scenario}, {note}",
            most={"ours": MOST_MS}, detail={"p50_ms": at(took_ms, 0.5)},
        )  # fmt: skip


def uploads(quick: bool) -> Iterator[Row]:
    """What clients upload."""
    clients, entries = (8, 32_768) if quick else (CLIENTS, material.ENTRIES)
    load = Load(clients, entries, min(AT_ONCE, clients))
    with tempfile.TemporaryDirectory() as folder, api(Path(folder), load) as served:
        few, everybody = served.take(load.at_once), served.take(clients)
    with tempfile.TemporaryDirectory() as folder:
        rival, reached = flower.take(Path(folder), load)
    megabytes = few.size_bytes / 1e6
    scenario = f"{clients} clients, {megabytes:.2g} MB, {load.at_once} at once"
    yield Row(
        "updates/s", few.updates_per_s, reached.updates_per_s, FLOWER, scenario,
        "until admitted; the rival's until its ServerApp has them",
        detail={
            "rival_superlink_updates_per_s": rival.updates_per_s, "rival_lost": reached.lost
        },
        least={"ratio": LEAST_RATIO},
    )  # fmt: skip
    yield Row(
        "server CPU ms", cpu_ms(few, clients), cpu_ms(rival, clients), FLOWER, scenario,
        "CPU time of the server's processes for one update",
    )  # fmt: skip
    for share in (0.5, 0.99):
        yield Row(
            f"admission p{share * 100:.0f} ms", at(few.took_s, share) * 1e3,
            at(rival.took_s, share) * 1e3, FLOWER, scenario,
            "an upload's first byte until it is admitted; the rival's until the SuperLink has it",
        )  # fmt: skip
    yield Row(
        "peak rss above idle MiB", few.server.above_idle_mib, rival.server.above_idle_mib, FLOWER,
        scenario, most={"ours": MOST_MIB},
    )  # fmt: skip
    scenario = f"{clients} clients, {megabytes:.2g} MB, all at once"
    yield Row("updates/s", everybody.updates_per_s, None, "", scenario)
    yield Row("admission p99 ms", at(everybody.took_s, 0.99) * 1e3, None, "", scenario)
    yield Row(
        "peak rss above idle MiB", everybody.server.above_idle_mib, None, "", scenario,
        most={"ours": MOST_MIB},
    )  # fmt: skip


def cpu_ms(found: Outcome, clients: int) -> float:
    """CPU time of the server's side for one update."""
    return found.server.cpu_s / clients * 1e3


def at(values: Sequence[float], share: float) -> float:
    """The value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    main("coordinator", measure)
