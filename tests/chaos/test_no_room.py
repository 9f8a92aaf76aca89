"""A disk or a quota is full: a clean refusal, and the same round goes on once there is room."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, check, config, opened, run

from anabranch.coordinator.store import Contribution, FullError
from anabranch.coordinator.store.sql import SqlStore

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
OUTCOME = (
    "the run ends in one line that names the place; with room again the same round goes on, "
    "nothing lost, nothing counted twice"
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Leave no block free."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_disk_that_is_full(seed: int, small_disk: Path, told: Told) -> None:
    at, ballast = random.Random(seed).randrange(1, 3 * CLIENTS), small_disk / "ballast"

    def moment(count: int) -> None:
        if count == at:
            fill(ballast)

    cfg = config()
    with pytest.raises(FullError, match=r"has no room: .*; free some, and go on"):
        run(cfg, small_disk, moment)
    # And again, while there is none.
    with pytest.raises(FullError, match="has no room"):
        run(cfg, small_disk)
    told.broke()
    ballast.unlink()
    run(cfg, small_disk)
    check(cfg, small_disk)
    told.outcome("disk full in a round", OUTCOME)


def test_a_quota_that_is_full(tmp_path: Path, told: Told) -> None:
    """Another run of the federation holds all but a little of its quota."""
    cfg = config(store={"quota_mb": 1})
    with closing(opened(cfg.model_copy(update={"run": "old"}), tmp_path)) as old:
        data = os.urandom((1 << 20) - 4_000)
        old.admit(Contribution(round=1, client="c", digest=old.put(data), size_bytes=len(data)))
    with pytest.raises(FullError, match=r"the quota of chaos is full: .*; raise store\.quota_mb"):
        run(cfg, tmp_path)
    with closing(opened(cfg, tmp_path)) as store:
        assert store.refusals()[-1].code == "no-room"
        assert store.notes("round") == [] or store.notes("round")[-1]["status"] == "published"
    told.broke()
    # Retention lets go of what the old run held.
    kept = cfg.model_copy(
        update={"run": "old", "store": cfg.store.model_copy(update={"keep_rounds": 1})}
    )
    with closing(opened(kept, tmp_path)) as old:
        assert isinstance(old, SqlStore)
        old.admit(Contribution(round=9, client="c", digest=old.put(b"x"), size_bytes=1))
        old.tidy()
    run(cfg, tmp_path)
    with closing(opened(cfg, tmp_path)) as store:
        assert [row["status"] for row in store.notes("round")] == ["published"] * 3
        assert len(store.contributions()) == 3 * CLIENTS
    told.outcome("a federation's quota of artifacts full in a round", OUTCOME)
