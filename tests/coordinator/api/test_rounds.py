"""A round that runs on Flower counts what a site without a SuperNode uploads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from flwr.app import Context, RecordDict

from anabranch.client.api.transfer import download, upload
from anabranch.client.app import app as client_app
from anabranch.coordinator.federation import START_FOLDER, load_federation
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.trust import trust_of
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire import decode_adapter
from anabranch.wire.keys import seeded_key
from anabranch.wire.plan import RoundPlan
from anabranch.wire.v1 import coordinator_pb2 as pb

Start = Callable[..., Any]
TASK, PARAMS = "anabranch.simulation.synthetic:SyntheticTask", '{"clients": 3}'


def grid(keys: str) -> InProcessGrid:
    """One node, client-0000."""
    given = {"partition-id": 0, "keys": keys} if keys else {"partition-id": 0}
    config = {"task": TASK, "task-params": PARAMS}
    return InProcessGrid(client_app, {10: Context(1, 10, given, RecordDict(), config)})


def uploading(world: Any, caller: Any, until: int, out: list[RoundPlan]) -> None:
    """What a site does: ask what there is to do, get the start, train, upload."""
    for _ in range(200):
        reply = caller.call("Uploads.Order", pb.OrderRequest(federation="f"))
        if reply.plan:
            plan = RoundPlan.model_validate_json(reply.plan)
            if plan.round not in [one.round for one in out]:
                out.append(plan)
                if reply.start_bytes:
                    path = world.folder / f"start-{plan.round}.bin"
                    size, _ = download(caller, "f", "start", path)
                    assert size == reply.start_bytes
                key = seeded_key("client-0001", 0) if world.signed else None
                data = world.made(plan, "client-0001", seed=plan.round, key=key)
                upload(caller, "f", plan.round, data, {"num-examples": 7.0})
            if len(out) == until:
                return
        time.sleep(0.05)


def test_who_joined_is_asked_and_its_upload_is_merged(start_world: Start) -> None:
    world = start_world(signed=True, rounds=2, quorum=2, deadline_s=30)
    site = world.peer("client-0001", "client", "f")
    site.call("Uploads.Join", pb.JoinRequest(federation="f"))
    folder = world.folder / "federations" / "f"
    config = load_federation(folder)
    plans: list[RoundPlan] = []
    thread = threading.Thread(target=uploading, args=(world, site, 2, plans))
    thread.start()
    with closing(world.store()) as store:
        template = read_adapter(folder / START_FOLDER)
        strategy = MergeStrategy(config, template, store, trust_of(folder, config, store))
        strategy.start(grid(str(folder / "keys")))
        thread.join()
        first, second = store.notes("round")
        assert (first["status"], second["status"]) == ("published", "published")
        assert (first["admitted"], second["admitted"]) == (2, 2)
        assert [row.client for row in store.contributions(2)] == ["client-0000", "client-0001"]
        assert store.contributions(2)[1].metrics == {"num-examples": 7.0}
        assert store.refusals() == []
        assert store.publications()[1].report["names"] == ["client-0000", "client-0001"]
        # What a site downloads is what is in service, to the bit.
        auditor = world.peer("look", "auditor", "f")
        path = world.folder / "latest.bin"
        download(auditor, "f", "latest", path)
        got = decode_adapter(path.read_bytes(), strategy.service.seeded, config.trains)
        assert got.hash() == strategy.adapter.hash()
    assert plans[1].start_hash != plans[0].start_hash


def test_who_joined_and_sends_nothing_costs_the_deadline_only(start_world: Start) -> None:
    world = start_world(rounds=1, quorum=1, deadline_s=1)
    site = world.peer("client-0001", "client", "f")
    site.call("Uploads.Join", pb.JoinRequest(federation="f"))
    folder = world.folder / "federations" / "f"
    with closing(world.store()) as store:
        strategy = MergeStrategy(
            load_federation(folder), read_adapter(folder / START_FOLDER), store
        )
        strategy.start(grid(""))
        (row,) = store.notes("round")
        assert (row["status"], row["admitted"]) == ("published", 1)
        (refusal,) = store.refusals(1)
        assert (refusal.client, refusal.code) == ("client-0001", "deadline")
    site.call("Uploads.Join", pb.JoinRequest(federation="f", leave=True))
    assert world.store().last_note("joined") == {"client": "client-0001", "here": False}
