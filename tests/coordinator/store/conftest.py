"""Real databases and a real S3 for the stores: every test gets its own."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.chaos.postgres import Postgres

from anabranch.coordinator.store import Store, StoreConfig, open_store

COUNT = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of its own on a socket."""
    with Postgres(safe=False) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """A new, empty database."""
    return postgres.database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/rounds.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens stores beside the test's folder, and closes them after it."""
    with ExitStack() as stack:

        def opener(url: str, run: str = "r", federation: str = "f", **changes: Any) -> Store:
            config = StoreConfig(url=url, **changes)
            store = open_store(config, tmp_path, federation=federation, run=run, durable=False)
            return stack.enter_context(closing(store))

        yield opener


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def open_again(
    request: pytest.FixtureRequest, open_one: Callable[..., Store]
) -> Callable[[], Store]:
    """Opens one and the same store, as every start of a coordinator does."""
    url = {"journal": "journal", "sqlite": "sqlite:///rounds.db"}.get(request.param)
    return partial(open_one, url or request.getfixturevalue("postgres_url"))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 server on loopback; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(address, trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket's name; this process's environment leads to its server."""
    name = f"bucket-{next(COUNT)}"
    for key, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    httpx.put(f"{s3}/{name}", trust_env=False).raise_for_status()
    return name
