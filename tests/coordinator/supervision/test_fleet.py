"""Federations that were started are kept at work, each on its port, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from anabranch.coordinator.federation import FederationConfig, write_federation
from anabranch.coordinator.flower import free_port
from anabranch.coordinator.rounds.control import Want, ask
from anabranch.coordinator.rounds.service import Service, service, start
from anabranch.coordinator.store import Store, open_store
from anabranch.coordinator.supervision import processes
from anabranch.coordinator.supervision.lease import supervised

SCRIPT = Path(__file__).with_name("stand_in.py")
PATIENCE_S = 300.0


class Running:
    """A fleet at work on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "fleet.log"
        self.begin()

    def begin(self) -> None:
        with self.log.open("ab") as log:
            self.fleet = subprocess.Popen(
                [sys.executable, str(SCRIPT), "fleet", str(self.folder), "1", "65535"], stderr=log
            )

    def told(self, event: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{"]
        return [row for row in rows if row.get("event") == event]

    def wait(self, what: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.05)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[list[Running]]:
    begun: list[Running] = []
    yield begun
    for one in begun:
        one.fleet.kill()
        one.fleet.wait()
        for path in tmp_path.iterdir():
            processes.kill_marked(str(path.resolve()))


def made(folder: Path, rounds: int = 2) -> Store:
    """A federation, and its store."""
    config = FederationConfig(
        name=folder.name, run="r", rounds=rounds, clients=4, quorum=4, durable=False
    )
    write_federation(config, folder)
    return open_store(config.store, folder, federation=config.name, run="r", durable=False)


def rests(store: Store) -> bool:
    now = service(store)
    return now is not None and not now.started


def test_started_federations_outlive_who_supervises_them(
    tmp_path: Path, running: list[Running]
) -> None:
    with (
        closing(made(tmp_path / "a")) as a,
        closing(made(tmp_path / "b")) as b,
        closing(made(tmp_path / "c")) as c,
        closing(made(tmp_path / "d")) as d,
    ):
        ports = [free_port() for _ in range(2)]
        for store, port in zip((a, b), ports, strict=True):
            start(store, port, "numbers", "root")
        running.append(one := Running(tmp_path))
        one.wait(lambda: a.contributions(1) and b.contributions(1))
        assert supervised(tmp_path / "a")
        # Killed with all that works for it, it goes on with the same rounds, on the same ports.
        one.fleet.kill()
        one.fleet.wait()
        one.wait(lambda: not supervised(tmp_path / "a") and not supervised(tmp_path / "b"))
        one.begin()
        one.wait(lambda: len(one.told("superlink")) >= 4)
        for name, port in zip("ab", ports, strict=True):
            said = [row["message"] for row in one.told("superlink") if row["federation"] == name]
            assert [f"answers at 127.0.0.1:{port}," in text for text in said] == [True, True]
        # One that is aborted rests, the other one goes on; what was never started does not begin.
        one.wait(lambda: len(a.contributions(1)) == 4 and len(b.contributions(1)) == 4)
        ask(a, Want.ABORT)
        one.wait(lambda: rests(a))
        assert service(a) == Service(
            False, ports[0], "numbers", "coordinator",
            "no further round is begun: the operator asked to abort",
        )  # fmt: skip
        one.wait(lambda: not supervised(tmp_path / "a"))
        assert supervised(tmp_path / "b")
        # A supervisor that is killed alone is started again.
        (pid,) = [
            pid for pid in children(one.fleet.pid)
            if str(tmp_path / "b").encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]  # fmt: skip
        os.kill(pid, signal.SIGKILL)
        one.wait(lambda: one.told("supervisor-died"))
        assert "was ended by SIGKILL" in one.told("supervisor-died")[0]["message"]
        (tmp_path / "b" / "finish").touch()
        one.wait(lambda: rests(b))
        now = service(b)
        assert now is not None
        assert now.why == "all 2 rounds are over"
        assert Counter((row.round, row.client) for row in b.contributions()) == {
            (number, f"site-{client}"): 1 for number in (1, 2) for client in range(4)
        }
        assert (service(c), c.notes("begun")) == (None, [])
        # One whose task is gone says so.
        start(d, free_port(), "letters", "root")
        one.wait(lambda: rests(d))
        now = service(d)
        assert now is not None
        assert now.why == "there is no task 'letters'; give one of numbers"


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_sigterm_ends_supervisors_and_keeps_what_was_started(
    tmp_path: Path, running: list[Running]
) -> None:
    with closing(made(tmp_path / "a", rounds=1)) as store:
        started = start(store, free_port(), "numbers", "root")
        running.append(one := Running(tmp_path))
        one.wait(lambda: one.told("round-collecting"))
        second = subprocess.run(
            [sys.executable, str(SCRIPT), "fleet", str(tmp_path), "1", "2"],
            capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        assert "another `coordinator up` works on it" in second.stderr
        one.fleet.send_signal(signal.SIGTERM)
        assert one.fleet.wait(PATIENCE_S) == 4
        assert service(store) == started
        assert not supervised(tmp_path / "a")
        assert "goes on with the next up" in one.told("stopped")[0]["message"]


def test_one_that_is_asked_to_end_before_it_began_starts_nothing(
    tmp_path: Path, running: list[Running]
) -> None:
    with closing(made(tmp_path / "a")) as store:
        start(store, free_port(), "numbers", "root")
        ask(store, Want.DRAIN)
        running.append(one := Running(tmp_path))
        one.wait(lambda: rests(store))
        now = service(store)
        assert now is not None
        assert now.why == "no further round is begun: the operator asked to drain"
        assert one.told("superlink") == []
