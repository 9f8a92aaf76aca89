"""Uploads by the API over a line that ends, or falls silent, after some bytes: counted once."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest
from tests.chaos.conftest import Told
from tests.chaos.line import Line, State
from tests.coordinator.api.conftest import World, start_world  # noqa: F401

from anabranch.client.api import caller as caller_module
from anabranch.client.api.caller import Caller, CallError
from anabranch.client.api.transfer import upload
from anabranch.coordinator.store.retention import sweep
from anabranch.coordinator.store.sql import SqlStore

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
STATES: tuple[State, ...] = ("cut", "dead", "deaf", "dumb")
HOW = {
    "cut": "ended",
    "dead": "silent in both directions",
    "deaf": "silent towards the coordinator",
    "dumb": "silent from the coordinator",
}


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("state", STATES if RUNS > 1 else ["cut", "dead"])
def test_an_upload_over_a_line_that_is_cut(
    start_world: Callable[..., World],  # noqa: F811
    state: State,
    seed: int,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caller_module, "ALIVE_S", 0.5)
    world = start_world()
    credentials = world.enrol("a", "client", "f")
    world.plan(1, "a")
    data = world.made(world.order(world.caller(credentials)), "a")
    broken = threading.Event()
    with Line(world.server.port) as line:

        def mend() -> None:
            broken.wait(20)
            time.sleep(1.5)
            line.renew()

        # Somewhere in the handshake, in the request, or in the update.
        line.after(random.Random(seed).randrange(1, 4000 + len(data)), state)
        mending = threading.Thread(target=mend)
        mending.start()
        told.broke()
        failed = 0
        while True:
            with Caller(f"localhost:{line.port}", credentials, timeout_s=5) as caller:
                try:
                    digest = upload(caller, "f", 1, data)
                    break
                except CallError:
                    failed += 1
                    broken.set()
                    time.sleep(0.1)
        broken.set()
        mending.join()
    store = world.store()
    assert isinstance(store, SqlStore)
    with closing(store):
        (row,) = store.contributions(1)
        assert (row.client, row.digest, store.get(digest)) == ("a", digest, data)
        # Nothing of what was cut off is left.
        sweep(store.engine, store.kept, grace_s=0.0)
        assert [name for name, _ in store.kept.names()] == [digest]
    assert list((world.folder / "api" / "uploads").iterdir()) == []
    told.outcome(
        f"line of an upload by the API {HOW[state]}, at any byte of it",
        "the site tries again and goes on where it was; counted once, nothing left behind",
    )
