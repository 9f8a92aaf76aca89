from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from anabranch.coordinator import logs
from anabranch.coordinator.federation import FederationConfig, write_federation
from anabranch.coordinator.rounds.control import Want, ask
from anabranch.coordinator.store import Contribution, Publication, Refusal, Store, open_store
from anabranch.coordinator.web.watch import server, watching


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    config = FederationConfig(name="demo", run="1", rounds=5)
    write_federation(config, tmp_path)
    opened = open_store(config.store, tmp_path, federation="demo", run="1")
    yield opened
    opened.close()


@pytest.fixture
def address(store: Store, tmp_path: Path) -> Iterator[str]:
    """A real server on loopback."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        serving = server(tmp_path)
        thread = threading.Thread(target=serving.run, args=([listening],))
        thread.start()
        end = time.monotonic() + 60
        while not serving.started and time.monotonic() < end:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        serving.should_exit = True
        thread.join()


def metrics(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.replace('federation="demo",run="1"', ""): float(value) for name, value in pairs}


def test_what_the_store_says_is_seen_from_outside(address: str, store: Store) -> None:
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{address}/readyz").json() == {"status": "ready"}
    empty = metrics(address)
    assert empty["anabranch_round{}"] == 0
    assert empty["anabranch_updates_total{}"] == 0
    for client in ("a", "b"):
        digest = store.put(client.encode())
        store.admit(Contribution(round=1, client=client, digest=digest, size_bytes=1))
    store.refuse(Refusal(round=1, client="c", code="norm", reason="too large"))
    facts = {
        "round": 1, "status": "published", "bytes_up": 11, "bytes_down": 7, "seconds": 2.5,
        "merge_seconds": 0.5, "truncation_error": 0.25,
    }  # fmt: skip
    store.publish(Publication(round=1, digest=store.put(b"x"), adapter_hash="h"), facts)
    store.note("planned", {"round": 2, "asked": ["a", "b", "c"]})
    ask(store, Want.PAUSE)
    found = metrics(address)
    assert found['anabranch_rounds_total{,status="published"}'] == 1
    assert found['anabranch_rounds_total{,status="abandoned"}'] == 0
    assert found['anabranch_refusals_total{code="norm",}'] == 1
    assert found['anabranch_bytes_total{,way="up"}'] == 11
    assert found["anabranch_updates_total{}"] == 2
    assert found["anabranch_last_merge_seconds{}"] == 0.5
    assert (found["anabranch_round{}"], found["anabranch_round_asked{}"]) == (2, 3)
    assert found["anabranch_paused{}"] == 1
    status = httpx.get(f"{address}/status").json()
    assert (status["round"], status["want"], status["adapter_hash"]) == (2, "pause", "h")


def test_a_store_that_is_gone_is_not_ready(
    address: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: object) -> None:
        raise OSError("no such database")

    monkeypatch.setattr(type(store), "latest", gone)
    answer = httpx.get(f"{address}/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "OSError")
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"federation\.toml"):
        watching(tmp_path / "none")


@pytest.mark.usefixtures("address")
def test_its_server_logs_as_the_rest_does() -> None:
    stream = io.StringIO()
    logs.configure("json", about={"federation": "demo"}, stream=stream, also=("uvicorn",))
    for name in ("uvicorn.error", "anabranch.coordinator"):
        logging.getLogger(name).warning("full", extra={"round": 3})
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(row["logger"], row["federation"], row["round"]) for row in rows] == [
        ("uvicorn.error", "demo", 3), ("anabranch.coordinator", "demo", 3),
    ]  # fmt: skip
