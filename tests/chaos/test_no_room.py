"""A disk or a quota is full: a clean refusal, and the same round goes on once there is room."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

import pytest
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, check, config, opened, run
from tests.disks import SmallDisk

from anabranch.coordinator.store import Contribution, FullError
from anabranch.coordinator.store.sql import SqlStore

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
OUTCOME = (
    "the run ends in one line that names the place; with room again the same round goes on, "
    "nothing lost, nothing counted twice"
)


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_disk_that_is_full(seed: int, small_disk: SmallDisk, told: Told) -> None:
    at = random.Random(seed).randrange(1, 3 * CLIENTS)

    def moment(count: int) -> None:
        if count == at:
            small_disk.fill()

    cfg, folder = config(), small_disk.folder
    with pytest.raises(FullError, match=r"has no room: .*; free some, and go on"):
        run(cfg, folder, moment)
    # And again, while there is none.
    with pytest.raises(FullError, match="has no room"):
        run(cfg, folder)
    told.broke()
    small_disk.free()
    run(cfg, folder)
    check(cfg, folder)
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
