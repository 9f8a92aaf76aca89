"""What a supervisor is made of: the lease, processes that die with it, backoff, preflight."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import IO

import pytest
from benchmarks.loopback import certificates, node_key

from anabranch.coordinator import logs
from anabranch.coordinator.federation import FederationConfig, write_federation
from anabranch.coordinator.rounds.control import Control, Want, ask, ends, heeded, latest
from anabranch.coordinator.store import Contribution, open_store
from anabranch.coordinator.supervision import lease, processes
from anabranch.coordinator.supervision.backoff import Backoff
from anabranch.coordinator.supervision.config import RestartConfig, load_coordinator
from anabranch.coordinator.supervision.preflight import examine_service
from anabranch.coordinator.supervision.watch import Watch


def test_a_lease_ends_with_its_holder_and_says_how(tmp_path: Path) -> None:
    assert lease.look(tmp_path) == (None, False)
    with lease.held(tmp_path, "7"):
        current, alive = lease.look(tmp_path)
        assert current is not None
        assert (current.run, current.pid, current.ended, alive) == ("7", os.getpid(), None, True)
    current, alive = lease.look(tmp_path)
    assert current is not None
    assert (current.ended, alive) == ("done", False)
    with pytest.raises(RuntimeError, match="luck"), lease.held(tmp_path, "8"):
        raise RuntimeError("no\nluck")
    current, alive = lease.look(tmp_path)
    assert current is not None
    assert (current.run, current.ended, alive) == ("8", "no luck", False)


def test_one_that_ends_during_a_look_was_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        stack.enter_context(lease.held(tmp_path, "7"))
        free = lease._free

        def ends(file: IO[str]) -> bool:
            stack.close()
            return free(file)

        monkeypatch.setattr(lease, "_free", ends)
        current, alive = lease.look(tmp_path)
    assert current is not None
    assert (current.ended, alive) == ("done", False)


HOLDER = """
import sys, time
from pathlib import Path
from anabranch.coordinator.supervision.lease import held
with held(Path(sys.argv[1]), "9"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_is_known_and_nobody_holds_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 0.1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert lease.look(tmp_path)[1]
    with (
        pytest.raises(lease.HeldError, match=f"process {holder.pid}, Flower run 9"),
        lease.held(tmp_path, "10"),
    ):
        raise AssertionError
    holder.kill()
    holder.wait()
    holder.stdout.close()
    current, alive = lease.look(tmp_path)
    assert current is not None
    assert (current.run, current.ended, alive) == ("9", None, False)
    with lease.held(tmp_path, "10"):
        pass


PARENT = """
import os, sys, time
from pathlib import Path
from anabranch.coordinator.supervision import processes
env = {**os.environ, processes.MARK: sys.argv[1]}
child = processes.start(["sleep", "60"], Path(sys.argv[1]) / "log", env)
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" in status.read_text()
    except OSError:
        return True


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert processes.marked(str(tmp_path)) == [child]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while not gone(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert gone(child)


def test_whatever_a_child_started_is_found_by_its_mark_and_killed(tmp_path: Path) -> None:
    env = {**os.environ, processes.MARK: str(tmp_path)}
    # A session of its own, as Flower gives to its SuperExec: no process group holds it.
    child = processes.start(["sh", "-c", "setsid sleep 60 & exec sleep 60"], tmp_path / "log", env)
    end = time.monotonic() + 10
    while len(processes.marked(str(tmp_path))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    killed = processes.kill_marked(str(tmp_path))
    assert child.pid in killed
    assert len(killed) == 2
    assert processes.how(child.wait()) == "was ended by SIGKILL"
    assert processes.marked(str(tmp_path)) == []
    assert processes.how(3) == "ended with code 3"


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert processes.tail(log) == ""
    log.write_text("one\n\x1b[92mtwo\x1b[0m\n\nnoise\nthree\nfour\n")
    assert processes.tail(log, lambda line: line != "noise") == "two | three | four"


def test_starts_come_later_and_later_until_something_is_gained() -> None:
    now = Backoff(RestartConfig(first_s=1, cap_s=5, most=6))
    waits = []
    for _ in range(6):
        now = now.after((0, 0))
        waits.append(now.wait_s)
    assert waits == [0, 1, 2, 4, 5, 5]
    assert not now.gives_up
    assert now.after((0, 0)).gives_up
    gained = now.after((0, 1))
    assert (gained.failures, gained.wait_s, gained.gives_up) == (1, 0, False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "task: Field required"),
        ('task = "a.b:C"', "give \\[tls\\] certificate, key and authority"),
        ('task = "a.b:C"\ninsecure = true\nhost = "0.0.0.0"', "without TLS only on loopback"),
        ('task = "a.b:C"\ninsecure = true\nnode_keys = "n"', "nodes prove their keys over TLS"),
        ('task = "a.b:C"\ninsecure = true\nport = 0', "port"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "coordinator.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        load_coordinator(tmp_path)


def test_the_preflight_looks_at_port_certificate_and_keys(tmp_path: Path) -> None:
    write_federation(FederationConfig(name="f", run="r", quorum=2), tmp_path / "federation")
    certificates(tmp_path)
    keys = tmp_path / "nodes"
    keys.mkdir()
    (tmp_path / "coordinator.toml").write_text(
        'task = "a.b:C"\nfederation = "federation"\nnode_keys = "nodes"\n'
        '[tls]\ncertificate = "server.pem"\nkey = "server.key"\nauthority = "ca.pem"\n'
    )
    config = load_coordinator(tmp_path)

    def told() -> dict[str, str]:
        return {one.check: one.told for one in examine_service(config) if not one.ok}

    assert "holds 0 keys, and the quorum is 2" in told()["node keys"]
    for name in ("a", "b"):
        node_key(keys, name)
    assert "tls" not in told()
    assert "node keys" not in told()
    (keys / "a.pub").write_text("no key")
    assert "a.pub is no public key" in told()["node keys"]
    (tmp_path / "server.key").write_bytes((keys / "b").read_bytes())
    assert "server.key" in told()["tls"]
    other = tmp_path / "other"
    other.mkdir()
    certificates(other)
    for name in ("server.pem", "server.key"):
        (tmp_path / name).write_bytes((other / name).read_bytes())
    assert "was not signed by" in told()["tls"]


def test_a_watch_tells_each_change_once(tmp_path: Path) -> None:
    config = FederationConfig(name="f", run="r", rounds=2, clients=2, quorum=1)
    store = open_store(config.store, tmp_path, federation="f", run="r", durable=False)
    watch = Watch(config, store)
    assert watch.look() == []
    store.note("planned", {"round": 1, "asked": ["a", "b"]})
    store.note("state", {"round": 1, "state": "collecting"})
    assert [one.event for one in watch.look()] == ["round-collecting"]
    digest = store.put(b"update")
    store.admit(Contribution(round=1, client="a", digest=digest, size_bytes=6, nonce="01"))
    assert [(one.event, one.about) for one in watch.look()] == [
        ("admitted", {"round": 1, "client": "a"})
    ]
    assert watch.look() == []
    assert watch.gained == (0, 1)
    ask(store, Want.PAUSE)
    assert [one.told for one in watch.look()] == ["asked to pause"]
    store.close()


def test_a_stop_is_done_with_when_the_next_run_begins_and_a_pause_is_not(tmp_path: Path) -> None:
    config = FederationConfig(name="f", run="r")
    store = open_store(config.store, tmp_path, federation="f", run="r", durable=False)
    for asked, then in (
        ([Want.STOP], Want.RUN),
        ([Want.PAUSE, Want.STOP, Want.STOP], Want.PAUSE),
        ([Want.RUN, Want.DRAIN], Want.RUN),
    ):
        for want in asked:
            ask(store, want)
        heeded(store)
        Control(store).begin()
        assert latest(store) is then
    # What no run has ended for is still to be heeded.
    ask(store, Want.ABORT)
    Control(store).begin()
    assert (latest(store), ends(store)) == (Want.ABORT, Want.ABORT)
    heeded(store)
    assert (latest(store), ends(store)) == (Want.ABORT, None)
    store.close()


def test_json_logs_say_what_a_line_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("anabranch")
    out, changes = StringIO(), StringIO()
    monkeypatch.setenv(logs.VARIABLE, "json")
    logs.configure(about={"federation": "f"}, stream=out)
    logs.tell_changes(changes, {"federation": "f"})
    child = logging.getLogger("anabranch.coordinator")
    child.info("plain")
    child.warning("%s left", "a", extra={"event": "left", "round": 3, "client": "a"})
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(row["message"], row["level"], row["federation"]) for row in rows] == [
        ("plain", "info", "f"), ("a left", "warning", "f"),
    ]  # fmt: skip
    assert (rows[1]["round"], rows[1]["client"]) == (3, "a")
    assert [json.loads(line)["event"] for line in changes.getvalue().splitlines()] == ["left"]
    logs.configure("text", stream=out)
    assert sum(hasattr(one, "set_up_here") for one in logger.handlers) == 1
    monkeypatch.setenv(logs.VARIABLE, "yaml")
    with pytest.raises(ValueError, match="yaml"):
        logs.configure()
