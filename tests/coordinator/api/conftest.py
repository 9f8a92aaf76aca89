from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.client.api.caller import Caller, CallError
from anabranch.client.api.credentials import Credentials, Invitation
from anabranch.client.api.enrolling import enrol
from anabranch.client.session import open_session
from anabranch.coordinator.api.config import ApiConfig
from anabranch.coordinator.api.identity import Identity, Role
from anabranch.coordinator.api.peers import Grant
from anabranch.coordinator.api.server import ApiServer, serving
from anabranch.coordinator.federation import (
    START_FOLDER,
    FederationConfig,
    load_federation,
    write_federation,
)
from anabranch.coordinator.store import Store, open_store
from anabranch.simulation.keys import write_keys
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire import UpdateMeta, encode_update
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import RoundPlan
from anabranch.wire.v1 import coordinator_pb2 as pb

TASK, PARAMS = "anabranch.simulation.synthetic:SyntheticTask", '{"clients": 3}'
LIMITS = {"stall_s": 0.5, "handshake_s": 0.5, "calls_per_s": 1000, "burst": 1000}


def update(
    plan: RoundPlan, start: Adapter, client: str, seed: int = 0, key: PrivateKey | None = None,
    **changes: Any,
) -> bytes:  # fmt: skip
    """An honest client's update, of noise."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.01
        for name, tensor in start.tensors(plan.trained).items()
    }
    fields = {
        "kind": "update", "base_hash": plan.base_hash, "start_hash": plan.start_hash,
        "federation": plan.federation, "run": plan.run, "round": plan.round, "client": client,
        "nonce": seed.to_bytes(16, "big"), "seed": None, "examples": 1,
        "issued_s": int(time.time()), **changes,
    }  # fmt: skip
    return encode_update(tensors, UpdateMeta(**fields), plan.codec, key).blob


@dataclass
class World:
    """An API on loopback, with peers who enrolled as anybody would."""

    folder: Path
    server: ApiServer
    callers: list[Caller] = field(default_factory=list)
    signed: bool = False
    stop: Callable[[], None] = lambda: None
    resume: Callable[[], None] = lambda: None

    def restart(self) -> None:
        """Serve anew, on the same ports."""
        self.stop()
        self.resume()

    @property
    def address(self) -> str:
        return f"localhost:{self.server.port}"

    @property
    def enrol_address(self) -> str:
        return f"localhost:{self.server.enrol_port}"

    def invite(self, name: str, role: str, *federations: str, organisation: str = "") -> Invitation:
        identity = Identity(organisation or f"org-{name}", name, Role(role))
        token, _ = self.server.peers.invite(Grant(identity, federations), 60)
        ca = self.server.authority.pem
        return Invitation(token, ca, self.address, self.enrol_address)

    def enrol(self, name: str, role: str, *federations: str, **given: Any) -> Credentials:
        folder = self.folder / "peers" / name
        key = given.pop("key", None)
        enrol(self.invite(name, role, *federations, **given), folder, key)
        return Credentials(folder)

    def caller(self, credentials: Credentials | bytes, address: str = "") -> Caller:
        self.callers.append(Caller(address or self.address, credentials, timeout_s=60))
        return self.callers[-1]

    def peer(self, name: str, role: str, *federations: str, **given: Any) -> Caller:
        return self.caller(self.enrol(name, role, *federations, **given))

    def store(self, federation: str = "f") -> Store:
        folder = self.folder / "federations" / federation
        config = load_federation(folder)
        return open_store(
            config.store, folder, federation=config.name, run=config.run, durable=False
        )

    def plan(self, number: int, *asked: str, federation: str = "f") -> None:
        """Begin to collect a round, as its coordinator would say it."""
        store = self.store(federation)
        store.note("planned", {"round": number, "asked": list(asked), "planned_s": 0})
        store.note("state", {"round": number, "state": "collecting"})
        store.close()

    def order(self, caller: Caller, federation: str = "f") -> RoundPlan:
        """What the round under way asks of a caller."""
        reply = caller.call("Uploads.Order", pb.OrderRequest(federation=federation))
        return RoundPlan.model_validate_json(reply.plan)

    def made(self, plan: RoundPlan, client: str, **given: Any) -> bytes:
        """An update for a plan whose start the seed alone describes."""
        start = seeded_start(open_session(TASK, PARAMS).template, plan.seed)
        return update(plan, start, client, **given)

    def code(self, name: str, request: Any, caller: Caller) -> str:
        """The code with which a call is refused."""
        streams = name.split(".")[1] in ("ListPeers", "ListRounds", "ListAdapters")
        with pytest.raises(CallError) as error:
            list(caller.stream(name, request)) if streams else caller.call(name, request)
        return error.value.code

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in self.server.audit.entries()]

    def refused(self, code: str) -> list[dict[str, Any]]:
        return [row for row in self.audit() if row["outcome"] == "refused" and row["code"] == code]


def make_federation(root: Path, name: str = "f", **changes: Any) -> Path:
    given = {
        "name": name, "run": "r", "rounds": 3, "clients": 2, "quorum": 1, "poll_s": 0.05,
        "durable": False, "evaluate_every": 0, "deadline_s": 20, "train": {"steps": 2},
        "recipe": {"method": "mean"}, "codec": {"name": "dense", "feedback": 0.0}, **changes,
    }  # fmt: skip
    config = FederationConfig.model_validate(given)
    folder = root / name
    write_federation(config, folder)
    write_adapter(open_session(TASK, PARAMS).template, folder / START_FOLDER)
    if config.signed:
        write_keys(folder, config)
    return folder


@pytest.fixture
def start_world(tmp_path: Path, flower_identity: None) -> Iterator[Callable[..., World]]:
    running: list[Any] = []
    worlds: list[World] = []

    def begin(
        limits: dict[str, Any] | None = None, flower: dict[str, Any] | None = None, **changes: Any
    ) -> World:
        make_federation(tmp_path / "federations", **changes)
        config = ApiConfig.model_validate(
            {
                "federations": tmp_path / "federations", "state": tmp_path / "api", "port": 0,
                "enrol_port": 0, "limits": {**LIMITS, **(limits or {})}, "flower": flower,
            }
        )  # fmt: skip
        running.append(serving(config))
        world = World(tmp_path, running[-1].__enter__(), signed=bool(changes.get("signed")))

        ports = {"port": world.server.port, "enrol_port": world.server.enrol_port}

        def resume() -> None:
            running.append(serving(config.model_copy(update=ports)))
            world.server = running[-1].__enter__()

        world.stop = lambda: running.pop().__exit__(None, None, None)
        world.resume = resume
        worlds.append(world)
        return world

    yield begin
    for world in worlds:
        for caller in world.callers:
            caller.__exit__(None, None, None)
    for one in running:
        one.__exit__(None, None, None)
