from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.session import open_session
from anabranch.coordinator.federation import START_FOLDER, FederationConfig, write_federation
from anabranch.coordinator.registry import enrol
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire.keys import new_key, write_key

CHECKS = [
    "configuration", "start adapter", "keys", "key files", "database", "store", "clock", "recipe",
    "disk", "memory",
]  # fmt: skip


def federation(folder: Path, **changes: Any) -> Path:
    config = FederationConfig.model_validate(
        {"name": "demo", "run": "1", "quorum": 2, "clients": 2, **changes}
    )
    write_federation(config, folder)
    template = open_session("anabranch.simulation.synthetic:SyntheticTask", '{"clients": 2}')
    write_adapter(template.template, folder / START_FOLDER)
    return folder


def looked(run: Any, folder: Path, *options: Any) -> tuple[int, dict[str, tuple[bool, str]]]:
    code, out, _ = run("doctor", folder, "--json", *options)
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


def test_a_port_that_is_taken(run: Any, tmp_path: Path) -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        free.bind(("127.0.0.1", 0))
        taken.listen()
        numbers = [one.getsockname()[1] for one in (taken, free)]
        free.close()
        folder = federation(tmp_path)
        options = ("--port", numbers[1], "--port", f"127.0.0.1:{numbers[0]}")
        code, out, _ = run("doctor", folder, "--json", *options)
    assert code == 1
    rows = [row for row in json.loads(out) if row["check"] == "port"]
    assert rows[0] == {"check": "port", "ok": True, "told": f"127.0.0.1:{numbers[1]} is free"}
    assert not rows[1]["ok"]
    assert (
        f"127.0.0.1:{numbers[0]} cannot be listened on (Address already in use)" in rows[1]["told"]
    )
    code, _, err = run("doctor", folder, "--port", "http")
    assert (code, err.count("\n")) == (2, 1)
    assert "--port 'http'" in err


def test_who_may_touch_the_keys(run: Any, tmp_path: Path) -> None:
    federation(tmp_path, signed=True)
    keys = tmp_path / "keys"
    write_key(new_key("coordinator"), keys)
    enrol(tmp_path, [new_key("a").public, new_key("b").public])
    for path in (keys, keys / "enrolled"):
        path.chmod(0o700)
    code, found = looked(run, tmp_path)
    assert (code, found["key files"][1]) == (0, "1 private keys that their owner alone reads")
    (keys / "enrolled").chmod(0o666)
    code, found = looked(run, tmp_path)
    assert (code, found["key files"][0]) == (1, False)
    assert "enrolled: others may write it" in found["key files"][1]
    (keys / "enrolled").chmod(0o600)
    # Not the coordinator's own: no other look reads it.
    write_key(new_key("spare"), keys)
    (keys / "spare.key").chmod(0o640)
    code, found = looked(run, tmp_path)
    assert "spare.key: others may read" in found["key files"][1]
