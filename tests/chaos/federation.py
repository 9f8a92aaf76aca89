"""A federation in one process in which something breaks, and what must be true of it afterwards."""

from __future__ import annotations

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
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import Store, open_store
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
from anabranch.wire.receipt import check_chain

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
    return open_store(cfg.store, folder, federation=cfg.name, run=cfg.run, durable=cfg.durable)


def template() -> Adapter:
    """What it begins with."""
    return open_session(TASK, PARAMS).template


def run(
    cfg: FederationConfig,
    folder: Path,
    moment: Moment = lambda count: None,
    tamper: Tamper = lambda order, reply: reply,
) -> None:
    """Run what is left of the federation, as its ServerApp does."""
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
        strategy = MergeStrategy(cfg, template(), store, trust)
        strategy.start(InProcessGrid(Tampering(), contexts))


def check(
    cfg: FederationConfig,
    folder: Path,
    *,
    abandoned: Mapping[int, str] | None = None,
    refused: Collection[tuple[int, str]] = (),
    false: Collection[int] = (),
) -> None:
    """What must be true of a run that is over.

    Args:
        cfg: The federation.
        folder: Its folder.
        abandoned: Rounds that came to nothing, and what their reason has to say.
        refused: Round and client of updates that were not admitted.
        false: Rounds whose receipts are false, for what they name was damaged.
    """
    ended = abandoned or {}
    with closing(opened(cfg, folder)) as store:
        rounds = {row["round"]: row for row in store.notes("round")}
        assert list(rounds) == list(range(1, cfg.rounds + 1))
        for number, row in rounds.items():
            wanted = "abandoned" if number in ended else "published"
            assert (row["status"], ended.get(number, "") in row.get("reason", "")) == (wanted, True)
        # Every admitted update counts once, by the rows and by the receipts.
        rows = Counter((row.round, row.client) for row in store.contributions())
        every = {(n, f"client-000{c}") for n in rounds for c in range(CLIENTS)}
        assert rows == Counter(every - set(refused))
        receipts = check_chain(store.receipts(), None)
        named = Counter((one.round, one.client) for one in receipts for one in one.inputs)
        assert named == rows
        verifier = Verifier(store, cfg, template())
        for data, receipt in zip(store.receipts(), receipts, strict=True):
            outcome = verifier.verify(data).outcome
            assert outcome == ("false" if receipt.round in false else "true"), receipt.round
        # What was written and never named is swept up, and nothing else.
        assert isinstance(store, SqlStore)
        kept = artifacts_of(cfg.store, folder, durable=False)
        sweep(store.engine, kept, grace_s=0.0)
        digests = {row.digest for row in [*store.contributions(), *store.publications()]}
        assert {name for name, _ in kept.names()} == digests
        # Nothing is under way any more, and whoever looks sees why a round came to nothing.
        stands = standing(cfg, store)
        assert (stands.done, stands.round, stands.published) == (
            cfg.rounds, None, cfg.rounds - len(ended),
        )  # fmt: skip
