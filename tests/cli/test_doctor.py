from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.session import open_session
from anabranch.coordinator.federation import START_FOLDER, FederationConfig, write_federation
from anabranch.coordinator.registry import enrol
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire.keys import new_key, write_key

CHECKS = ["configuration", "start adapter", "keys", "store", "recipe", "disk", "memory"]


def federation(folder: Path, **changes: Any) -> Path:
    config = FederationConfig.model_validate(
        {"name": "demo", "run": "1", "quorum": 2, "clients": 2, **changes}
    )
    write_federation(config, folder)
    template = open_session("anabranch.simulation.synthetic:SyntheticTask", '{"clients": 2}')
    write_adapter(template.template, folder / START_FOLDER)
    return folder


def looked(run: Any, folder: Path) -> tuple[int, dict[str, tuple[bool, str]]]:
    code, out, _ = run("doctor", folder, "--json")
    return code, {row["check"]: (row["ok"], row["told"]) for row in json.loads(out)}


def test_a_sound_federation(run: Any, tmp_path: Path) -> None:
    code, found = looked(run, federation(tmp_path))
    assert code == 0
    assert list(found) == CHECKS
    assert all(ok for ok, _ in found.values())
    assert found["store"][1].endswith("0 rounds are over, 0 published")
    code, out, _ = run("doctor", tmp_path)
    assert code == 0
    assert out.count("ok") == len(CHECKS)


def test_what_a_look_depends_on_ends_the_list(run: Any, tmp_path: Path) -> None:
    code, found = looked(run, tmp_path)
    assert (code, list(found)) == (1, ["configuration"])
    assert "federation.toml" in found["configuration"][1]
    write_federation(FederationConfig(name="demo", run="1"), tmp_path)
    code, found = looked(run, tmp_path)
    assert (code, list(found)) == (1, ["configuration", "start adapter"])


@pytest.mark.parametrize(
    ("changes", "check", "told"),
    [
        ({"recipe": {"method": "krum", "params": {"f": 3}}}, "recipe", "krum"),
        ({"store": {"url": "sqlite:////proc/none/s.db"}}, "store", "none"),
        ({"clients": 10**12}, "disk", "MB are free"),
    ],
)
def test_what_would_stop_a_coordinator(
    run: Any, tmp_path: Path, changes: dict[str, Any], check: str, told: str
) -> None:
    code, found = looked(run, federation(tmp_path, **changes))
    assert code == 1
    assert not found[check][0]
    assert told in found[check][1]


def test_a_signed_federation_needs_keys_for_its_quorum(run: Any, tmp_path: Path) -> None:
    federation(tmp_path, signed=True)
    code, found = looked(run, tmp_path)
    assert (code, found["keys"][0]) == (1, False)
    write_key(new_key("coordinator"), tmp_path / "keys")
    enrol(tmp_path, [new_key("a").public])
    code, found = looked(run, tmp_path)
    assert "1 clients are enrolled, and the quorum is 2" in found["keys"][1]
    enrol(tmp_path, [new_key("b").public])
    code, found = looked(run, tmp_path)
    assert (code, found["keys"][1]) == (0, "2 clients are enrolled")
