"""The database is in a network of its own, and the link to it goes down: nothing is sent back.

Needs root and network namespaces; ``make chaos`` runs it, ``make test`` does not.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, check, config, run
from tests.chaos.namespaces import ip, why_not
from tests.chaos.postgres import Postgres

from anabranch.coordinator.store import database

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
NAME = f"chaos{os.getpid()}"[:12]
HERE, THERE, PORT = "10.231.77.1", "10.231.77.2", 5432


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    if RUNS < 2:
        pytest.skip("a network of its own; make chaos")
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    assert ip("netns", "add", NAME)
    try:
        inside = ("netns", "exec", NAME, "ip")
        assert ip("link", "add", f"{NAME}a", "type", "veth", "peer", "name", f"{NAME}b")
        assert ip("link", "set", f"{NAME}b", "netns", NAME)
        assert ip("addr", "add", f"{HERE}/30", "dev", f"{NAME}a")
        assert ip(*inside, "addr", "add", f"{THERE}/30", "dev", f"{NAME}b")
        assert ip("link", "set", f"{NAME}a", "up")
        assert ip(*inside, "link", "set", f"{NAME}b", "up")
        with Postgres(PORT, THERE, namespace=NAME) as running:
            yield running
    finally:
        ip("link", "del", f"{NAME}a")
        ip("netns", "del", NAME)


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_link_to_the_database_that_goes_down(
    server: Postgres, seed: int, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both sides of what the system takes for a line that is cut: 25 s in service.
    monkeypatch.setitem(database.ALIVE, "tcp_user_timeout", 1_000)
    draw = random.Random(seed)
    at, after_s, down_s = (
        draw.randrange(1, 3 * CLIENTS),
        draw.uniform(0, 0.03),
        draw.choice((0.5, 4)),
    )

    def beside() -> None:
        time.sleep(after_s)
        told.broke()
        assert ip("link", "set", f"{NAME}a", "down")
        time.sleep(down_s)
        assert ip("link", "set", f"{NAME}a", "up")

    def moment(count: int) -> None:
        if count == at:
            threading.Thread(target=beside).start()

    name = server.database().removeprefix("postgresql:///").partition("?")[0]
    cfg = config(store={"url": f"postgresql://postgres@{THERE}:{PORT}/{name}", "patience_s": 60})
    run(cfg, tmp_path, moment)
    check(cfg, tmp_path)
    told.outcome(
        "link down between the namespaces of coordinator and PostgreSQL",
        "the same round goes on; nothing lost, nothing counted twice",
    )
