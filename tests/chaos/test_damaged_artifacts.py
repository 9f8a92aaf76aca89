"""Bytes turn, or are cut off, in the store: found by the digest, and nothing wrong is merged."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from tests.chaos.conftest import Told
from tests.chaos.federation import check, config, opened, run, verified

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.flower import free_port
from anabranch.coordinator.store.opening import artifacts_of

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
LONG = RUNS > 1
OUTCOME = (
    "found by the digest: the round ends with that reason, the next one goes on, and "
    "`anabranch verify` names the update"
)
Damage = Callable[[bytes, random.Random], bytes]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One bit is another."""
    place = draw.randrange(8 * len(data))
    return bytes(byte ^ (1 << place % 8 if n == place // 8 else 0) for n, byte in enumerate(data))


def cut_off(data: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return data[: draw.randrange(len(data))]


DAMAGE: dict[str, Damage] = {"a bit turned": flipped, "the end cut off": cut_off}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server on loopback, to which this process's environment leads."""
    port = free_port()
    script = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            for key, value in settings.items():
                patch.setenv(key, value)
            for _ in range(1200):
                try:
                    httpx.put(f"{address}/chaos", trust_env=False).raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            yield "s3://chaos"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(params=["folder", *(["s3"] if LONG else [])])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where artifacts are: a folder, and in the long form a bucket too."""
    if request.param == "folder":
        return "artifacts"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def damage(cfg: FederationConfig, folder: Path, digest: str, how: Damage, seed: int) -> None:
    """Change what is kept under a digest."""
    kept = artifacts_of(cfg.store, folder, durable=False)
    data = how(kept.get(digest), random.Random(seed))
    if cfg.store.artifacts.startswith("s3://"):
        kept._files.pipe_file(kept._path(digest), data)  # type: ignore[attr-defined]
    else:
        next(folder.rglob(digest)).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: restore a backup"):
        kept.get(digest)


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("what", DAMAGE)
def test_an_update_that_is_damaged_before_it_is_merged(
    what: str, seed: int, artifacts: str, tmp_path: Path, told: Told
) -> None:
    """The coordinator dies once the round is closed, and has to read the updates again."""
    cfg = config(store={"artifacts": artifacts})

    def dies() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path, closed=dies)
    with closing(opened(cfg, tmp_path)) as store:
        row = random.Random(seed).choice(store.contributions(1))
    told.broke()
    damage(cfg, tmp_path, row.digest, DAMAGE[what], seed)
    run(cfg, tmp_path)
    reason = f"the merge failed: artifact {row.digest} in"
    check(cfg, tmp_path, abandoned={1: reason}, false=[1])
    where = "in S3" if artifacts.startswith("s3") else "in a folder"
    told.outcome(f"an update's artifact {where}: {what}, before it is merged", OUTCOME)


def test_an_update_that_is_gone_before_it_is_merged(tmp_path: Path, told: Told) -> None:
    cfg = config()

    def dies() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path, closed=dies)
    with closing(opened(cfg, tmp_path)) as store:
        digest = store.contributions(1)[0].digest
    told.broke()
    next(tmp_path.rglob(digest)).unlink()
    run(cfg, tmp_path)
    check(
        cfg, tmp_path, abandoned={1: f"the merge failed: no artifact {digest}"},
        undecided=[1], missing=[digest],
    )  # fmt: skip
    missed = OUTCOME.replace("found by the digest", "missed")
    told.outcome("an update's artifact in a folder: gone, before it is merged", missed)


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_after_it_was_merged(
    what: str, seed: int, tmp_path: Path, told: Told
) -> None:
    """An update, and the adapter in service, from which no run goes on then."""
    cfg = config(rounds=2)
    run(cfg, tmp_path)
    with closing(opened(cfg, tmp_path)) as store:
        row = random.Random(seed).choice(store.contributions(1))
        latest = store.latest()
    assert latest is not None
    told.broke()
    damage(cfg, tmp_path, row.digest, DAMAGE[what], seed)
    assert verified(cfg, tmp_path) == {1: "false", 2: "true"}
    damage(cfg, tmp_path, latest.digest, DAMAGE[what], seed)
    assert verified(cfg, tmp_path) == {1: "false", 2: "false"}
    with pytest.raises(ValueError, match=f"artifact {latest.digest} in .* restore a backup"):
        run(config(), tmp_path)
    told.outcome(
        f"an update and the adapter in service: {what}, after the merge",
        "`anabranch verify` says so; no run goes on from a damaged adapter",
    )
