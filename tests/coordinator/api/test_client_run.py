"""``anabranch client run``: a site without a SuperNode, from joining to the federation's end."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from filelock import FileLock
from flwr.app import Context, RecordDict

from anabranch.cli import client_run
from anabranch.cli.main import main
from anabranch.client.api.caller import CallError
from anabranch.client.api.credentials import CERTIFICATE_FILE, Credentials
from anabranch.client.api.line import Line, Waiting
from anabranch.client.api.taking_part import Ended, Manner, TakingPart
from anabranch.client.app import app as client_app
from anabranch.client.lone import Answer, LoneNode, NodeRefusedError, Order
from anabranch.coordinator.federation import START_FOLDER, load_federation
from anabranch.coordinator.rounds.control import Want, ask
from anabranch.coordinator.store import open_store
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.trust import trust_of
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire.keys import seeded_key, write_key
from anabranch.wire.v1 import coordinator_pb2 as pb

Start = Callable[..., Any]
TASK, PARAMS = "anabranch.simulation.synthetic:SyntheticTask", '{"clients": 3}'
SITE = ("--task", TASK, "--task-params", PARAMS, "--every", "0.05", "--json")
TERNARY = {"name": "ternary", "density": 0.1, "feedback": 1.0}

GATED = """
import pathlib, time
from anabranch.simulation.synthetic import SyntheticTask

class Gated(SyntheticTask):
    def train(self, model, partition, plan):
        with open("trained.txt", "a") as file:
            file.write(f"{plan.seed}\\n")
        while not pathlib.Path("gate").exists():
            time.sleep(0.02)
        return super().train(model, partition, plan)
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a site of client-0001 in this process; returns exit code, events and complaint."""

    def site(cert: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        words = ["anabranch", "client", "run", "f", "--cert", str(cert), *SITE, *arguments]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        out, told = capsys.readouterr()
        return int(ended.value.code or 0), list(map(json.loads, out.splitlines())), told

    return site


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [one["event"] for one in events]


@contextmanager
def beside(work: Callable[[], Any]) -> Iterator[None]:
    """Something happens in a thread meanwhile; what it raises is raised here."""
    failed: list[BaseException] = []

    def job() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=job)
    thread.start()
    yield
    thread.join()
    if failed:
        raise failed[0]


def until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def taking_part(world: Any, cert: Path, node: LoneNode, tell: Any, once: bool = False) -> Ended:
    """A site's part, of which every event is told."""
    name, manner = str(Credentials(cert).about["name"]), Manner(every_s=0.05, once=once)
    with Line(Credentials(cert), world.address) as line:
        stop = threading.Event()
        return TakingPart(line, "f", name, node, world.folder, tell, manner, stop).run()


def rounds(folder: Path, nodes: int, store: Any) -> MergeStrategy:
    """Every round of a federation, with the first so many clients on nodes."""
    config = load_federation(folder)
    keys = {"keys": str(folder / "keys")} if config.signed else {}
    contexts = {
        10 + number: Context(
            1, 10 + number, {"partition-id": number, **keys}, RecordDict(),
            {"task": TASK, "task-params": PARAMS},
        )
        for number in range(nodes)
    }  # fmt: skip
    trust = trust_of(folder, config, store) if config.signed else None
    strategy = MergeStrategy(config, read_adapter(folder / START_FOLDER), store, trust)
    strategy.start(InProcessGrid(client_app, contexts))
    return strategy


def test_a_site_trains_as_its_node_would_until_all_is_over(
    start_world: Start, run: Any, tmp_path: Path
) -> None:
    given = {"signed": True, "rounds": 2, "quorum": 2, "codec": TERNARY, "deadline_s": 300}
    world = start_world(**given)
    folder = world.folder / "federations" / "f"
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    cert = world.enrol("client-0001", "client", "f").folder
    keys = str(folder / "keys")
    found: list[MergeStrategy] = []
    with closing(world.store()) as store:

        def federation() -> None:
            until(lambda: store.last_note("joined"))
            found.append(rounds(folder, 1, store))

        with beside(federation):
            code, events, told = run(cert, "--partition", "1", "--keys", keys)
        assert (code, told) == (0, "")
        assert [row["status"] for row in store.notes("round")] == ["published", "published"]
        rows = [store.contribution(number, "client-0001") for number in (1, 2)]
        assert store.refusals() == []
    made = [one for one in events if one["event"] == "admitted"]
    assert [one["artifact"] for one in made] == [row.digest for row in rows]
    assert rows[0].metrics["num-examples"] > 0
    assert {"joined", "waiting", "training", "made", "uploading", "over"} <= set(kinds(events))
    assert events[-1] == {
        "event": "over", "federation": "f", "done": 2, "rounds": 2,
        "told": "f is over: 2 of 2 rounds",
    }  # fmt: skip
    # With that client on a node the adapter is the same, error feedback and all.
    config = load_federation(other)
    with closing(open_store(config.store, other, federation="f", run="r", durable=False)) as store:
        assert rounds(other, 2, store).adapter.hash() == found[0].adapter.hash()


def test_killed_after_training_it_uploads_the_same_bytes_once_the_coordinator_is_back(
    start_world: Start, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start_world()
    cert = world.enrol("client-0001", "client", "f").folder
    world.plan(1, "client-0001")
    (world.folder / "gated.py").write_text(GATED)
    command = [sys.executable, "-m", "anabranch.cli", "client", "run", "f", "--cert", str(cert)]
    command += [*SITE, "--task", "gated:Gated"]
    with subprocess.Popen(command, cwd=world.folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = map(json.loads, process.stdout)
        assert "training" in (one["event"] for one in lines)
        world.stop()
        (world.folder / "gate").touch()
        assert "away" in (one["event"] for one in lines)
        process.send_signal(signal.SIGKILL)
    (kept,) = (cert / "state").glob("*.update")
    blob = kept.read_bytes().partition(b"\n")[2]
    monkeypatch.chdir(world.folder)
    monkeypatch.syspath_prepend(str(world.folder))
    code, _, told = run(cert, "--once", "--task", "gated:Gated")
    assert (code, "does not answer" in told) == (6, True)
    events: list[tuple[str, str, dict[str, Any]]] = []

    def back() -> None:
        until(lambda: events)
        world.resume()
        with closing(world.store()) as store:
            until(lambda: store.contributions(1))
            store.note("round", {"round": 1, "status": "abandoned", "reason": "few"})
            facts = {"round": 2, "reason": "the operator asked to drain", "want": "run"}
            store.note("stopped", facts)

    config = {"task": "gated:Gated", "task-params": PARAMS, "client": "client-0001"}
    node = LoneNode({**config, "state": str(cert / "state")})
    with beside(back):
        assert taking_part(world, cert, node, lambda *one: events.append(one)) is Ended.OVER
    names = [event for event, _, _ in events]
    assert names[:2] == ["away", "back"]
    assert names.count("away") == 1
    assert [facts["again"] for event, _, facts in events if event == "made"] == [True]
    assert events[-1][1] == "f is over: 1 of 3 rounds (the operator asked to drain)"
    (row,) = world.store().contributions(1)
    assert row.digest == hashlib.sha256(blob).hexdigest()
    assert len((world.folder / "trained.txt").read_text().splitlines()) == 1


def test_what_cannot_go_on_is_said_in_one_line(start_world: Start, run: Any) -> None:
    world = start_world(signed=True)
    cert = world.enrol("client-0001", "client", "f").folder
    keys = ("--keys", str(world.folder / "federations" / "f" / "keys"))
    world.plan(1, "client-0001")

    def fails(*arguments: str) -> tuple[int, str]:
        code, _, told = run(cert, "--once", *arguments)
        assert len(told.splitlines()) == 1
        return code, told

    code, told = fails("--task-params", "[]")
    assert (code, "is no JSON object" in told) == (2, True)
    code, told = fails()
    assert (code, "give --keys, a folder with coordinator.pub" in told) == (2, True)
    code, told = fails(*keys, "--task", "no.such:Task")
    assert (code, "there is no module" in told) == (1, True)
    code, told = fails(*keys, "--task-params", '{"clients": 3, "data_seed": 1}')
    assert (code, "base mismatch" in told) == (1, True)
    # Somebody else's orders.
    other = seeded_key("coordinator", 1)
    (world.folder / "other").mkdir()
    (world.folder / "other" / "coordinator.pub").write_text(f"{other.public.line}\n")
    write_key(seeded_key("client-0001", 0), world.folder / "other")
    code, told = fails("--keys", str(world.folder / "other"))
    assert (code, "the plan is refused (unknown-key)" in told) == (1, True)
    (lock,) = (cert / "state").glob("*.lock")
    with FileLock(lock):
        code, told = fails(*keys)
    assert (code, "another `client run` takes part in f" in told) == (2, True)
    # With all in order it does the round, and has nothing to do after it.
    code, events, told = run(cert, "--once", *keys)
    assert (code, kinds(events)[-1], told) == (0, "admitted", "")
    code, events, _ = run(cert, "--once", *keys)
    assert (code, kinds(events)) == (0, ["joined", "waiting"])
    assert events[1]["told"] == "waits for round 1 to end; it has this site's update"
    world.server.peers.revoke("client-0001")
    code, _, told = run(cert, *keys)
    assert (code, "the certificate was revoked (revoked)" in told) == (5, True)


def test_secure_aggregation_needs_a_supernode(start_world: Start, run: Any) -> None:
    world = start_world(signed=True, secure={}, recipe={"method": "fedit"})
    cert = world.enrol("client-0001", "client", "f").folder
    code, events, told = run(cert)
    assert (code, events) == (5, [])
    assert "secure aggregation needs a SuperNode" in told


def test_it_says_what_it_waits_for_until_it_is_told_to_stop(
    start_world: Start, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start_world(max_norm=1e-9)
    cert = world.enrol("client-0001", "client", "f").folder
    said: list[str] = []
    codes: list[str] = []

    def tell(event: str, told: str, facts: dict[str, Any]) -> None:
        said.append(told)
        codes.extend([facts["code"]] if event == "refused" else [])

    monkeypatch.setattr(client_run, "_teller", lambda *about: tell)
    first = "waits for round 1 of 3"
    paused = "waits for the operator, who has paused the federation"
    last = "waits for the next round; round 1 takes nothing more of this site"

    def operator() -> None:
        with closing(world.store()) as store:
            until(lambda: first in said)
            ask(store, Want.PAUSE)
            until(lambda: paused in said)
            ask(store, Want.RUN)
            world.plan(1, "client-0001")
            until(lambda: last in said)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with beside(operator):
        code, _, told = run(cert)
    assert (code, told) == (4, "")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    # Once each, however often it looked.
    assert all(one != other for one, other in itertools.pairwise(said))
    assert (said.count(paused), said.count(last), codes) == (1, 1, ["norm"])
    assert "goes on when started again" in said[-1]


def test_an_order_that_stands_no_more_is_let_go(start_world: Start) -> None:
    world = start_world()
    credentials = world.enrol("a", "client", "f")
    world.plan(1, "a")

    class Slow(LoneNode):
        """Finds, the first time, that its start belongs to a round that was begun meanwhile."""

        rounds: ClassVar[list[int]] = []

        def answer(self, order: Order, start: bytes | None) -> Answer:
            self.rounds.append(order.plan.round)
            if order.plan.round == 1:
                with closing(world.store()) as store:
                    store.note("round", {"round": 1, "status": "abandoned", "reason": "few"})
                world.plan(2, "a")
                raise NodeRefusedError("round 1: another start")
            return super().answer(order, start)

    events: list[str] = []
    node = Slow({"task": TASK, "task-params": PARAMS, "client": "a"})
    ended = taking_part(
        world, credentials.folder, node, lambda event, *_: events.append(event), once=True
    )
    assert ended is Ended.ONCE
    assert node.rounds == [1, 2]
    assert events == ["joined", "training", "outdated", "training", "made", "uploading", "admitted"]
    assert [row.client for row in world.store().contributions(2)] == ["a"]


def test_a_certificate_is_renewed_in_time(start_world: Start) -> None:
    world = start_world()
    credentials = world.enrol("a", "client", "f")
    path = credentials.folder / CERTIFICATE_FILE
    before, days = path.read_bytes(), 0.0
    with Line(credentials, world.address, lambda: time.time() + days * 86_400) as line:
        first = line.caller()
        assert line.caller() is first
        days = 59
        assert not line.renew()
        days = 61
        assert line.renew()
        assert path.read_bytes() != before
        second = line.caller()
        assert second is not first
        second.call("Uploads.Order", pb.OrderRequest(federation="f"))
        assert not line.renew()
        line.drop()
        days = 91
        with pytest.raises(CallError, match="enrol again") as error:
            line.caller()
        assert error.value.exit_code == 5


def test_tries_come_less_often_while_they_fail() -> None:
    waiting, others = Waiting(2.0, 60.0, "a"), Waiting(2.0, 60.0, "b")
    for failed in range(8):
        wanted = min(60.0, 2.0 * 2**failed)
        assert 0.75 * wanted <= waiting.next_s(failed=True) <= 1.25 * wanted
        others.next_s(failed=True)
    assert 1.5 <= waiting.next_s(failed=False) <= 2.5
    assert 1.5 <= waiting.next_s(failed=True) <= 2.5
    assert waiting.next_s(failed=True) != others.next_s(failed=True)
