"""A federation in one process in which something breaks, and what must be true of it afterwards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.registry import client_keys, coordinator_key
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import Refusal, Store, open_store
from anabranch.coordinator.store.opening import artifacts_of
from anabranch.coordinator.store.retention import sweep
from anabranch.coordinator.store.sql import SqlStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.trust import trust_of
from anabranch.coordinator.verification import Verifier
from anabranch.simulation.engine.identity import server_identity
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.simulation.keys import write_keys
from anabranch.vectors import Adapter
from anabranch.wire.keys import by_id
from anabranch.wire.receipt import check_chain
from anabranch.wire.signing import KeyRing

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 4}'
CLIENTS = 4

Moment = Callable[[int], None]
"""Told after each update that is on its way how many there were."""
Tamper = Callable[[Message, Message], Message]
"""An order to train and the honest reply to what came back."""


def config(**changes: Any) -> FederationConfig:
    """Four clients that all have to contribute to three rounds."""
    given = {
        "name": "chaos", "run": "r", "rounds": 3, "clients": CLIENTS, "quorum": CLIENTS,
        "poll_s": 0, "deadline_s": 60, "evaluate_every": 0, "join_timeout_s": 5,
        "train": {"steps": 2}, "recipe": {"method": "median"},
        "codec": {"name": "ternary", "density": 0.2, "feedback": 0.0}, **changes,
    }  # fmt: skip
    return FederationConfig.model_validate(given)


def opened(cfg: FederationConfig, folder: Path) -> Store:
    """The federation's store."""
    return open_store(cfg.store, folder, federation=cfg.name, run=cfg.run, patient=True)


def template() -> Adapter:
    """What it begins with."""
    return open_session(TASK, PARAMS).template


def run(
    cfg: FederationConfig,
    folder: Path,
    moment: Moment = lambda count: None,
    tamper: Tamper = lambda order, reply: reply,
    wall: Callable[[], float] = time.time,
    closed: Callable[[], None] = lambda: None,
) -> None:
    """Run what is left of the federation, as its ServerApp does.

    Args:
        cfg: The federation.
        folder: Its folder.
        moment: Told of each update.
        tamper: Stands between the clients and the coordinator.
        wall: The coordinator's clock, where it signs.
        closed: Called when a round is closed, before it is merged.
    """
    keys = {"keys": str(write_keys(folder, cfg))} if cfg.signed else {}
    contexts = {
        node: Context(
            1, node, {"partition-id": node - 10, **keys}, RecordDict(),
            {"task": TASK, "task-params": PARAMS},
        )
        for node in range(10, 10 + CLIENTS)
    }  # fmt: skip
    updates = 0

    class Tampering(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            nonlocal updates
            reply = client_app(message, context)
            if message.metadata.message_type == MessageType.TRAIN:
                updates += 1
                moment(updates)
                return tamper(message, reply)
            return reply

    with server_identity(), closing(opened(cfg, folder)) as store:
        trust = trust_of(folder, cfg, store) if cfg.signed else None
        if trust is not None:
            trust.wall = wall
        noted = store.note

        def note(event: str, facts: dict[str, Any]) -> None:
            noted(event, facts)
            if event == "state" and facts["state"] == "merging":
                closed()

        store.note = note  # type: ignore[method-assign]
        strategy = MergeStrategy(cfg, template(), store, trust)
        strategy.start(InProcessGrid(Tampering(), contexts))


def check(
    cfg: FederationConfig,
    folder: Path,
    *,
    abandoned: Mapping[int, str] | None = None,
    refused: Collection[tuple[int, str]] | None = (),
    false: Collection[int] = (),
    undecided: Collection[int] = (),
    missing: Collection[str] = (),
) -> None:
    """What must be true of a run that is over.

    Args:
        cfg: The federation.
        folder: Its folder.
        abandoned: Rounds that came to nothing, and what their reason has to say.
        refused: Round and client of updates that were not admitted; None: any may be missing.
        false: Rounds whose receipts are false, for what they name was damaged.
        undecided: Rounds of which nobody can tell, for what they name is gone.
        missing: Artifacts that are gone.
    """
    ended = abandoned or {}
    with closing(opened(cfg, folder)) as store:
        rounds = {row["round"]: row for row in store.notes("round")}
        assert list(rounds) == list(range(1, cfg.rounds + 1))
        for number, row in rounds.items():
            status = "abandoned" if number in ended else "published"
            assert (row["status"], ended.get(number, "") in row.get("reason", "")) == (status, True)
        # Every admitted update counts once, by the rows and by the receipts.
        rows = Counter((row.round, row.client) for row in store.contributions())
        every = {(n, f"client-000{c}") for n in rounds for c in range(cfg.clients)}
        missing_rows = every - rows.keys() if refused is None else set(refused)
        assert rows == Counter(every - missing_rows)
        receipts = check_chain(store.receipts(), None)
        named = Counter((one.round, one.client) for one in receipts for one in one.inputs)
        assert named == rows
        wanted = dict.fromkeys(rounds, "true") | dict.fromkeys(false, "false")
        assert verified(cfg, folder) == wanted | dict.fromkeys(undecided, "undecided")
        # What was written and never named is swept up, and nothing else.
        assert isinstance(store, SqlStore)
        kept = artifacts_of(cfg.store, folder, durable=False)
        sweep(store.engine, kept, grace_s=0.0)
        digests = {row.digest for row in [*store.contributions(), *store.publications()]}
        assert {name for name, _ in kept.names()} == digests - set(missing)
        # Nothing is under way any more, and whoever looks sees why a round came to nothing.
        stands = standing(cfg, store)
        assert (stands.done, stands.round, stands.published) == (
            cfg.rounds, None, cfg.rounds - len(ended),
        )  # fmt: skip


def verified(cfg: FederationConfig, folder: Path) -> dict[int, str]:
    """What ``anabranch verify`` says of each round."""
    with closing(opened(cfg, folder)) as store:
        verifier = Verifier(store, cfg, template(), *_rings(cfg, folder))
        verdicts = [verifier.verify(data) for data in store.receipts()]
        return {verdict.receipt.round: verdict.outcome for verdict in verdicts}


def _rings(cfg: FederationConfig, folder: Path) -> tuple[KeyRing | None, KeyRing | None]:
    if not cfg.signed:
        return None, None
    own = KeyRing(by_id([coordinator_key(folder).public]))
    return own, KeyRing(client_keys(folder).enrolled)


def refusals(cfg: FederationConfig, folder: Path) -> list[Refusal]:
    """What was refused, and why."""
    with closing(opened(cfg, folder)) as store:
        return store.refusals()
