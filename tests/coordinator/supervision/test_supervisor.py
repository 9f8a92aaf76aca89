"""The supervisor, with processes that stand in for Flower's: kills, SIGTERM, giving up."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.postgres import Postgres

from anabranch.coordinator.federation import FederationConfig, write_federation
from anabranch.coordinator.flower import free_port
from anabranch.coordinator.store import Store, open_store
from anabranch.coordinator.supervision import lease, processes
from anabranch.coordinator.supervision.config import load_coordinator
from anabranch.coordinator.supervision.supervisor import Supervisor

SCRIPT = Path(__file__).with_name("stand_in.py")
KILLS = int(os.environ.get("CHAOS_KILLS", "4"))
PATIENCE_S = 120.0


class Running:
    """A supervisor at work on a folder."""

    def __init__(self, folder: Path, rounds: int, most: int = 50, **store: Any) -> None:
        self.folder = folder
        self.config = FederationConfig.model_validate(
            {
                "name": "f", "run": "r", "rounds": rounds, "clients": 4, "quorum": 4,
                "durable": False, "store": store,
            }
        )  # fmt: skip
        write_federation(self.config, folder)
        (folder / "coordinator.toml").write_text(
            f'task = "a.b:C"\ninsecure = true\nport = {free_port()}\n'
            f"[restart]\nfirst_s = 0.1\ncap_s = 0.2\nmost = {most}\n"
        )
        self.log = folder / "up.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.up = subprocess.Popen(
                [sys.executable, str(SCRIPT), "up", str(self.folder)], stderr=log
            )

    def store(self) -> Store:
        return open_store(self.config.store, self.folder, federation="f", run="r", durable=False)

    def told(self, event: str | None = None) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{"]
        return [row for row in rows if event in (None, row.get("event"))]

    def pid(self, who: str) -> int | None:
        """The process of a part, if it is there."""
        if who == "up":
            return self.up.pid
        if who == "serverapp":
            current, alive = lease.look(self.folder)
            return current.pid if current is not None and alive else None
        mark = b"\0link\0"
        if who == "standby":
            mark = b"supervision.waiting\0"
            if not (self.folder / "flower" / "standby" / "socket").exists():
                return None
        for pid in processes.marked(str(self.folder.resolve())):
            with contextlib.suppress(OSError):
                named = mark in Path(f"/proc/{pid}/cmdline").read_bytes()
                if named and pid != self.pid("serverapp"):
                    return pid
        return None

    def wait(self, what: Any) -> None:
        end = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.02)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[list[Running]]:
    begun: list[Running] = []
    yield begun
    for one in begun:
        one.up.kill()
        one.up.wait()
        processes.kill_marked(str(one.folder.resolve()))


def test_whatever_is_killed_the_same_round_goes_on(tmp_path: Path, running: list[Running]) -> None:
    draw = random.Random(5)
    running.append(one := Running(tmp_path, rounds=2 + KILLS))
    store = one.store()

    def runs() -> set[str]:
        return {row["by"] for row in store.notes("planned")}

    one.wait(runs)
    for number in range(KILLS):
        who, before = ("serverapp", "superlink", "up")[number % 3], runs()
        time.sleep(draw.uniform(0, 0.4))
        one.wait(lambda part=who: one.pid(part))
        pid = one.pid(who)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        if who == "up":
            assert one.up.wait() == -signal.SIGKILL
            one.start()
        one.wait(lambda known=before: runs() - known)
    (tmp_path / "finish").touch()
    assert one.up.wait(PATIENCE_S) == 0
    # Every update once; whoever had answered was not asked again.
    rows = Counter((row.round, row.client) for row in store.contributions())
    rounds = one.config.rounds
    assert rows == {(n, f"site-{c}"): 1 for n in range(1, rounds + 1) for c in range(4)}
    assert [row["round"] for row in store.notes("round")] == list(range(1, rounds + 1))
    assert len(runs()) == 1 + KILLS
    store.close()
    assert processes.marked(str(tmp_path.resolve())) == []
    died = [row["message"] for row in one.told("serverapp-died") + one.told("superlink-died")]
    assert all("was killed" in text or "SIGKILL" in text for text in died)
    assert died


def test_the_next_serverapp_is_the_process_that_waited(
    tmp_path: Path, running: list[Running]
) -> None:
    running.append(one := Running(tmp_path, rounds=1, most=3))
    for who in ("serverapp", "superlink", "up"):
        one.wait(lambda: one.pid("serverapp"))
        one.wait(lambda: one.pid("standby"))
        waits, pid = one.pid("standby"), one.pid(who)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        if who == "up":
            one.up.wait()
            one.start()
        else:
            one.wait(lambda pid=waits: one.pid("serverapp") == pid)
    # Killed while nobody needs it, it is no failure.
    one.wait(lambda: one.pid("serverapp"))
    one.wait(lambda: one.pid("standby"))
    pid = one.pid("standby")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "finish").touch()
    assert one.up.wait(PATIENCE_S) == 0
    assert len(one.told("serverapp-died") + one.told("superlink-died")) == 2
    assert not (tmp_path / "flower" / "standby").exists()
    assert processes.marked(str(tmp_path.resolve())) == []


def test_a_preflight_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    write_federation(FederationConfig(name="f", run="r"), tmp_path)
    (tmp_path / "coordinator.toml").write_text('task = "a.b:C"\ninsecure = true\n')

    def refuses() -> None:
        assert processes.marked(str(tmp_path.resolve())) != []
        raise ValueError("the port is taken")

    with pytest.raises(ValueError, match="the port is taken"):
        Supervisor(load_coordinator(tmp_path)).run(refuses)
    assert processes.marked(str(tmp_path.resolve())) == []
    assert not (tmp_path / "flower" / "standby").exists()
    assert not lease.supervised(tmp_path)


def test_a_run_that_the_next_superlink_begins_is_followed(
    tmp_path: Path, running: list[Running]
) -> None:
    """Submitted to one that died before it was begun: Flower's database remembers it."""
    for name in ("hold", "owed"):
        (tmp_path / name).write_text("77")
    running.append(one := Running(tmp_path, rounds=1, most=0))
    one.wait(lambda: one.told("serverapp"))
    assert one.told("taken-over")[0]["message"] == "Flower run 77 is at work already, and goes on"
    (tmp_path / "finish").touch()
    (tmp_path / "hold").unlink()
    assert one.up.wait(PATIENCE_S) == 0
    with closing(one.store()) as store:
        assert {row["by"] for row in store.notes("planned")} == {"77"}


def test_a_database_that_is_away_is_waited_for(tmp_path: Path, running: list[Running]) -> None:
    (tmp_path / "hold").touch()
    with Postgres() as server:
        running.append(one := Running(tmp_path, rounds=1, url=server.database()))
        one.wait(lambda: one.pid("serverapp"))
        server.kill()
        pid = one.pid("serverapp")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        # Between rounds it asks the store whether there is to be another one.
        one.wait(lambda: one.told("no-store"))
        server.start()
        (tmp_path / "finish").touch()
        (tmp_path / "hold").unlink()
        assert one.up.wait(PATIENCE_S) == 0
        with closing(one.store()) as store:
            assert [row["round"] for row in store.notes("round")] == [1]
    assert "does not answer" in one.told("no-store")[0]["message"]


def test_sigterm_keeps_the_round_and_up_goes_on(tmp_path: Path, running: list[Running]) -> None:
    running.append(one := Running(tmp_path, rounds=3))
    store = one.store()
    one.wait(lambda: store.contributions(1))
    one.up.send_signal(signal.SIGTERM)
    assert one.up.wait(PATIENCE_S) == 4
    held = len(store.contributions())
    assert processes.marked(str(tmp_path.resolve())) == []
    assert "goes on with the next up" in one.told("stopped")[-1]["message"] or held % 4 == 0
    (tmp_path / "finish").touch()
    one.start()
    assert one.up.wait(PATIENCE_S) == 0
    assert len(store.contributions()) == 12
    store.close()


def test_nobody_works_beside_it(tmp_path: Path, running: list[Running]) -> None:
    running.append(one := Running(tmp_path, rounds=1))
    one.wait(lambda: one.pid("serverapp"))
    second = subprocess.run(
        [sys.executable, str(SCRIPT), "up", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert "another `coordinator up` works on it" in second.stderr
    # It ended nothing of the first one's.
    (tmp_path / "finish").touch()
    assert one.up.wait(PATIENCE_S) == 0
    assert not one.told("serverapp-died")


def test_it_gives_up_with_the_reason(tmp_path: Path, running: list[Running]) -> None:
    (tmp_path / "broken").touch()
    running.append(one := Running(tmp_path, rounds=1, most=2))
    assert one.up.wait(PATIENCE_S) == 1
    died = [row["message"] for row in one.told("serverapp-died")]
    assert died == ["the ServerApp died: the folder is broken"] * 3
    assert "3 starts in a row came to nothing" in one.told("gave-up")[0]["message"]
